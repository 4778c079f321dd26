"""``loraformat combine``: several adapters to one."""
