"""safetensors at byte level: dtypes, header, memory-mapped files.

Read `dtypes`, `header` and `mapped`, in this order; `arrays` shows stored bytes as numpy arrays,
`torch_arrays` those as torch tensors.
"""
