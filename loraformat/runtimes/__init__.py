"""Inference runtimes: their rules about adapters, and how each loads one.

::

    facts ─── rules (what is it?) ──┐
                                    ├── judge ──> findings ── remedies (commands)
    known/ (what does it do?) ──────┘
    usage  (how is it told to load an adapter?)

Everything here is pure: facts come from a converter's ``examine``, and nothing is read.
"""
