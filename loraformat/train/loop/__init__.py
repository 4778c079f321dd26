"""The training loop: gradients, optimizer, evaluation, checkpoints, for any model.

In which order to read: `loop`; `accumulation` (gradients of micro-batches and ranks), `optimizer`
with `optimizer_options`; `evaluation`; `saved_state` (checkpoints of a run) and
`metrics`; `distributed`, `interruption` and `memory` (the process and its surroundings).
"""
