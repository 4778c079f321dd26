"""``loraformat unmerge``: exact with an undo record, approximate without.

`recorder` writes the record during a merge, `undoing` restores from it, `subtract` does without.
"""
