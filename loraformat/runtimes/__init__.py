"""What other programs do with an adapter: the rules they keep, and how each loads one."""
