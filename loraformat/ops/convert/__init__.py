"""``loraformat convert``: conversion between formats."""
