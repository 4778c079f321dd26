"""Safe reading and atomic writing of files and directories.

Start with `safe_directory` (opening files of a stranger's directory) and `atomic_output` (writing a
directory whole or not at all, on `durable` and `atomic_swap`); `atomic_file` does the same for one
file. `strict_json` reads this format's own JSON, `foreign_json` that of other programs.
"""
