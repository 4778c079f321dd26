"""GGUF, the format of llama.cpp: bases and LoRA adapters.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and what llama.cpp's own
loader (``gguf.cpp``) makes of it. From the bottom: `types` and `values` are the vocabulary;
`cursor`, `keys` and `header` turn bytes into a checked table of contents; `parts` and
`container` open a file; `blocks` turns stored numbers into float32 and back; `writing`
streams a new file.

No foreign program sees a file before `header` has accepted it.
"""
