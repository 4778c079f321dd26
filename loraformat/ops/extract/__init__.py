"""``loraformat extract``: an adapter from a base and its fine-tune."""
