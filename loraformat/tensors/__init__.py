"""safetensors at byte level: dtypes, header, memory-mapped files.

Read `dtypes`, `header` and `mapped`, in this order.
"""
