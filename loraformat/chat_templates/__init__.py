"""Chat templates: rendering of conversations, and properties found by trials.

`process` renders templates in a process of its own, in which `worker` runs; `probe` finds what a
template wants, and how it frames a turn.
"""
