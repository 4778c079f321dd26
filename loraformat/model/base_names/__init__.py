"""Names of a base's tensors on disk, in transformers, and in adapters.

An adapter speaks of modules in memory, as they were called when it was trained; a checkpoint has
the names of the day on which it was saved. `BaseNames` is the one place where the two meet: every
verb that holds an adapter against a base asks it. Read `resolver` first, then `in_memory`, which
asks transformers, `sources` (its conversion mapping, read backwards) and `meta_model` (its model
without weights).
"""

from __future__ import annotations

from loraformat.model.base_names.resolver import BaseNames, Parameter, names_of

__all__ = ["BaseNames", "Parameter", "names_of"]
