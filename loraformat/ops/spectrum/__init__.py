"""``loraformat spectrum``: what ranks an adapter uses, as a table and as a plot."""
