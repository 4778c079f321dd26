"""LoRA adapters in GGUF.

What llama.cpp computes is W x + (alpha / r) B (A x), with one alpha for the whole file and
the rank r of each tensor; alpha 0 means 1 instead of the quotient. It checks names and shapes
and little else, so everything that it would compute wrongly is refused here: `refusals`.
`plan` finds the tensors, `metadata` the keys, `write` and `read` put them together; `experts`
joins what GGUF keeps apart.
"""
