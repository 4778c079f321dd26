"""Merged adapters out of a model again, bit by bit where an undo record tells."""
