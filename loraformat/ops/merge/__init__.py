"""Adapters into a base, tile by tile."""
