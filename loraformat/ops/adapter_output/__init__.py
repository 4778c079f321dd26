"""Adapter output: to a file or directory, or into a bundle."""
