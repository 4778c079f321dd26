"""Which runtime will be right about an adapter, and the form that is right in all of them."""
