"""Models in GGUF files.

Read `write`, then `read`. `general_keys` names the keys that are of no architecture; `model_card`
and `pooling` translate those that have a file of their own beside safetensors.
"""
