"""The adapter: where branches are, how they begin, how they are written."""
