"""A model directory of safetensors shards: reading, layout, writing.

`read_directory` opens one as transformers lays it out, `stored_tensors` finds NF4 weights among its
tensors, `quantized` opens what other methods have quantized; `layout` decides where tensors lie,
`writer` and `write_directory` write it.
"""
