"""Several adapters to one."""
