"""GGUF files at byte level: keys with values, and tensors.

Read `types` and `values`, the vocabulary; `cursor`, `keys` and `header`, which turn a stranger's
bytes into a checked table of contents; `split_files` and `reader`, which open files; `writer`.
No foreign program sees a file before `header` has accepted it.
"""
