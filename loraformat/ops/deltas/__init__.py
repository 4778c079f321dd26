"""Between the lazy tensors of adapters and the factors that `loraformat.algebra` computes with."""
