"""Format-independent checkpoints and adapters, which all converters read and write.

Start with `checkpoint` (a base: lazy tensors, config, carried files) and `adapter` (deltas and
replacements). `architecture` and `tied_head` read names and config, `base_names` resolves the
names of adapters, the others recognise what files hold.
"""
