"""``loraformat convert``: any format into any other."""
