"""safetensors at the level of bytes: element types, the header, mapped files.

Read `dtypes`, `header` and `mapped`, in this order.
"""
