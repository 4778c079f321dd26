"""``loraformat info``: descriptions of models and adapters."""
