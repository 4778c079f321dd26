"""The base: transformers' own classes whose weights stay in mapped shards."""
