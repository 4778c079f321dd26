"""The undo record of a merge.

`record` is the file of ``spec/undo-1.0.md`` and `rules` reads it; `interval_code` and `fixed_point`
are the arithmetic. Only ``merge --undo`` and ``unmerge`` use it.
"""
