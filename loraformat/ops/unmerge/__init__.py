"""``loraformat unmerge``: exact with an undo record, approximate without."""
