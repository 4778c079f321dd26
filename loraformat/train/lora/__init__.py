"""The adapter: where LoRA branches are attached, how they are initialised, how they are written.

In which order to read: `options`; `target_modules` (modules that can take a branch, and which of
them are trained); `branch` (the low-rank branch of each kind of module) with `second_moments`
(statistics for ``reduce``); `initialise`; `branches` (those of a whole model, new or from an
adapter); `replaced_weights` (tensors that an adapter replaces); `trained_adapter` (the PEFT
directory and its training record).
"""
