"""Facts about model families, and parsing of tensor names.

`table` has what families differ in (fused experts, Conv1D, heads), `expert_names` how experts are
called on disk and in memory, `tensor_names` what a name says by itself, `model_class` what the
class in a ``config.json`` says. No file is opened here.
"""
