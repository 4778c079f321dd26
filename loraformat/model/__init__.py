"""The neutral objects that converters read into and write from, and what is known of them.

Start with `checkpoint` (a base: lazy tensors, config, carried files) and `adapter` (deltas and
replacements). `architecture` and `tied_head` read names and config, `base_names` resolves the
names of adapters, the others recognise what files hold.
"""
