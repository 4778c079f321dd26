"""Which type each tensor of an output gets, and the lazy tensors that have it."""
