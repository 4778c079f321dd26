"""Commands for llama.cpp that keep a quantized base and load the adapter beside it."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraformat.ops.merge.report import MergeReport

__all__ = ["commands"]


def commands(report: MergeReport) -> list[str]:
    """Return what to run instead of a merge whose base is quantized already.

    Parameters
    ----------
    report : MergeReport
        Its source, source format and adapters count.

    Returns
    -------
    list of str
        Command lines, in order.
    """
    base, lines = report.source, []
    if report.source_format != "gguf":
        lines.append(f"loraformat convert {quote(report.source)} base.gguf --dtype q8_0")
        base = "base.gguf"
    several, options = len(report.adapters) > 1, []
    for number, adapter in enumerate(report.adapters, 1):
        name = f"lora-{number}.gguf" if several else "lora.gguf"
        lines.append(
            f"loraformat convert {quote(adapter.path)} {name} --base {quote(report.source)}"
        )
        scaled = "" if adapter.weight == 1 else f":{adapter.weight:g}"
        options.append(f"--lora-scaled {name}{scaled}" if scaled else f"--lora {name}")
    return [*lines, f"llama-server -m {quote(base)} {' '.join(options)}"]
