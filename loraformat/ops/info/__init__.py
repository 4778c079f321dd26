"""``loraformat info``: what a model or an adapter is, without reading its weights."""
