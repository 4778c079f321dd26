"""Format-independent checkpoints and adapters, which all converters read and write.

Start with `checkpoint` (a base: lazy tensors, config, carried files) and `adapter` (deltas and
replacements). `rows` reads a tensor by rows; `quantization_method` says how a method stores
weights, `packed_weights` which one did. `architecture` and `tied_head` read names and config,
`base_names` resolves the names of adapters, the others recognise what files hold.
"""
