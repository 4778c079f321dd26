"""Adapters into a base, tile by tile.

`plan` says which tensors change, `deltas` by which low-rank terms, `tensor` computes them, and
`tokenizers` what comes along beside weights; `job` puts them together, or `separate_delta` where
the base stays quantized. `recorder` writes the undo record, `report` measures and tells, `merge` is
the verb.
"""
