"""Opening bases and adapters by path or Hub id."""
