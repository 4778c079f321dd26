"""Numbers of ggml's types, to float32 and back.

Read `blocks` first. `block_bytes` encodes rows, `scale_search` finds the scales of the low types,
`rounding` does both for whole matrices on all CPUs and measures what is lost.
"""
