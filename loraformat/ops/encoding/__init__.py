"""The encoding of each output tensor, and lazy tensors in that encoding."""
