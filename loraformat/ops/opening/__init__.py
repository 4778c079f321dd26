"""Opening what verbs work on: a base or an adapter by name, and the base of an adapter."""
