"""The verbs ``train``, ``eval`` and ``generate``: one run of each, from options to report.

In which order to read: `options` (all options in one table) and `config_file` (as YAML); `verbs`
(the public functions); `train`, `evaluate` and `generate` (what they run); `setup` (what they open
and check first), `memory_plan` (and disk space); `run_directory` (and resuming); `text_generation`;
`report`, `loss_curve` and `adapter_files` (what is reported of a run, and stored with its adapter).
"""
