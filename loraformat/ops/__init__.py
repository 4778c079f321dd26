"""The verbs: each walks over lazy tensors, one at a time."""
