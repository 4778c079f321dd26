"""Compatibility of adapters with inference runtimes, and a portable form."""
