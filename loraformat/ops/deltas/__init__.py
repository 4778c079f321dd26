"""Conversion between lazy adapter tensors and the factors of `loraformat.algebra`."""
