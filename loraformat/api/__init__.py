"""The public functions of `loraformat`: one per verb of the command line, with its words.

Each takes the verb's arguments in their order and its options as keywords of the same names
(``--max-shard-size`` is ``max_shard_size``; ``--from`` is ``from_``, which Python reserves), prints
nothing and returns a report. The command line calls these functions. What they do is in
`loraformat.ops`, `loraformat.train` and `loraformat.demo`, which are imported on the
first call.

`arguments` and `progress` are what the functions share.
"""
