"""The base model: transformers' own classes, computed from weights that stay in mapped shards.

In which order to read:

- weights: `readable_base` (an open model of any format), `stored_weights` (its tensors by name),
  `matrix` (a weight that gives out dequantized blocks), `device` (the same on a GPU)
- products: `compute_dtype`, `buffers`, `matmul`, `lora_matmul` (with gradients),
  `unneeded_products` (left out when a layer is recomputed)
- modules: `linear`, `experts`, `embedding`; `meta_model` (a model without weights) and
  `bind_weights` (which replaces its modules by these)
- layers: `decoder` (where they are, and the output head), `layer_call`, `checkpointing`,
  `layer_prefetch` and `madvise` (their pages come and go)
- loss: `cross_entropy`; checks of a model's class before any work: `trial`
"""
