"""``loraformat spectrum``: singular values and effective ranks of an adapter."""
