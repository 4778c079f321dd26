"""The base model: transformers' own classes, computed from weights that stay in mapped shards.

In which order to read:

- weights: `stored_weights` (tensors of an open model, of any format), `matrix` (a weight that gives
  out dequantized blocks), `device` (the same on a GPU)
- products: `compute_dtype`, `buffers`, `matmul`, `unneeded_products` (left out when a layer is
  recomputed)
- modules: `linear` (with LoRA factors, and gradients), `experts`, `embedding`; `meta_model` (a
  model without weights, its layers and head) and `bind_weights` (which replaces its modules by
  these)
- layers: `layer_call`, `checkpointing`, `layer_prefetch` (their pages are read and evicted)
- loss: `cross_entropy`, and how a class makes logits
- `trial`: checks of a model's class before any work
"""
