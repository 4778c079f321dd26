"""The undo record of a merge: what rounding loses, so that the original comes back bit for bit.

`record` is the file of ``spec/undo-1.0.md`` and `rules` reads it; `interval_code` and `fixed_point`
are the arithmetic. Only ``merge --undo`` and ``unmerge`` use it.
"""
