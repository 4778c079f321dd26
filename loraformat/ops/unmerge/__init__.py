"""``loraformat unmerge``: exact with an undo record, approximate without.

`undoing` restores from the record that `loraformat.ops.merge.recorder` wrote, `subtract` does
without.
"""
