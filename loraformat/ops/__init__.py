"""The verbs: each walks over lazy tensors, one at a time.

The four larger ones are packages whose ``verb`` is the way in.
"""
