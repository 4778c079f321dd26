"""Python code that loads an adapter with transformers and PEFT."""

from __future__ import annotations

import json

from loraformat.runtimes.use import Use

__all__ = ["loading_lines"]


def loading_lines(
    use: Use, auto: str, *, imports: str = "", prepared: str = "", options: str = ""
) -> str:
    """Return the Python lines that load an adapter on its base.

    Parameters
    ----------
    use : Use
    auto : str
        transformers' class that opens the base.
    imports, prepared : str
        Lines after the imports, and between tokenizer and model; each ends with a line break.
    options : str
        Of the model, each with a comma before it.

    Examples
    --------
    >>> lines = loading_lines(Use("near", "org/base", "org/near", 8), "AutoModel")
    >>> print(lines.splitlines()[5])
    model = AutoModel.from_pretrained(base, dtype="auto")
    """
    said = f"\nrevision = {json.dumps(use.revision)}" if use.revision else ""
    pinned = ", revision=revision" if use.revision else ""
    return f"""\
from peft import PeftModel
from transformers import {auto}, AutoTokenizer
{imports}
base = {json.dumps(use.base)}{said}
tokenizer = AutoTokenizer.from_pretrained(base{pinned})
{prepared}model = {auto}.from_pretrained(base{pinned}{options}, dtype="auto")
model = PeftModel.from_pretrained(model, {json.dumps(use.adapter)})
"""
