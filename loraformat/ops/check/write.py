"""Files that load an adapter in each runtime: a Modelfile, command lines, a script."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.errors import OutputError, UsageError
from loraformat.hub import hub_id, resolve
from loraformat.ops.check.chats import chat_beside
from loraformat.runtimes.judge import obstacles
from loraformat.runtimes.known import RUNTIMES
from loraformat.runtimes.remedies import Names
from loraformat.runtimes.task_usage import TASK_USAGE
from loraformat.runtimes.usage import snippets_of
from loraformat.runtimes.use import Snippet, Use
from loraformat.storage.atomic_file import open_publication

if TYPE_CHECKING:
    from loraformat.ops.check.check import CheckReport

__all__ = ["Written", "snippets", "write_usage"]


@dataclass(frozen=True, slots=True)
class Written:
    """Files written for runtimes.

    Attributes
    ----------
    path : str
        The directory.
    files : list of str
    left_out : list of str
        Why there is no file for a runtime, as sentences.
    """

    path: str
    files: list[str]
    left_out: list[str]


def write_usage(report: CheckReport, target: str | Path, *, base: str | None = None) -> Written:
    """Write one file for each runtime that will be correct, into a new directory.

    Local paths are absolute in them, so that the files can be moved. ``base`` is given where the
    adapter does not say it, or is held against another copy.

    Raises
    ------
    UsageError
        If nobody says what the base is.
    OutputError
        If the directory exists.
    """
    path = Path(target)
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise OutputError("already exists", path=path, hint="name a new directory")
    made, left_out = snippets(report, base=base)
    inputs = [Path(word) for word in (report.path, base) if word and os.path.lexists(word)]
    with open_publication("directory", path, plan="runtime files", inputs=inputs) as stage:
        for piece in made:
            stage.write(piece.file, piece.text.encode("utf-8"))
        stage.commit()
    return Written(str(path), [piece.file for piece in made], left_out)


def snippets(report: CheckReport, *, base: str | None = None) -> tuple[list[Snippet], list[str]]:
    """Return the text for each runtime that will be correct, and why others have none."""
    use = _use(report, base)
    made, left_out = [], []
    wrong = obstacles(report.findings)
    for name in report.verdicts:
        if name in wrong:
            left_out.append(f"{name}: not supported correctly ({', '.join(sorted(wrong[name]))})")
        elif report.format != "peft" and RUNTIMES[name].format != report.format:
            left_out.append(f"{name}: reads no {report.format}")
        elif (usage := TASK_USAGE.get(report.facts.task or "")) and name not in usage.snippets:
            left_out.append(
                f"{name}: the generated commands produce text, but the adapter {usage.does}"
            )
        else:
            made.append(_snippet(name, report, use))
    return made, left_out


def _use(report: CheckReport, base: str | None) -> Use:
    named = base or report.base or report.facts.base_model
    if not named:
        raise UsageError("the base is unknown", hint="give it with --base")
    repo, revision = named, None
    if not os.path.lexists(named) and (found := hub_id(named)) is not None:
        repo, revision = found
        if named == report.facts.base_model:
            revision = revision or report.facts.base_commit
    stem = Names(report.path).stem
    is_gguf = report.format == "gguf-lora"
    return Use(
        name=stem,
        base=_placed(repo),
        adapter=_placed(report.path),
        rank=max(report.facts.rank, 1),
        gguf=_placed(report.path) if is_gguf else f"{stem}.gguf",
        base_gguf=_placed(named) if named.endswith(".gguf") else "model.gguf",
        revision=revision,
        chat=chat_beside(resolve(report.path).path, Path(named)),
        on_hub=resolve(report.path).repo is not None,
        labels=report.facts.labels,
    )


def _placed(word: str) -> str:
    """Return a local path as an absolute one; a Hub id is unchanged."""
    return os.path.abspath(word) if os.path.lexists(word) else word


def _snippet(name: str, report: CheckReport, use: Use) -> Snippet:
    piece = snippets_of(report.facts.task)[name](use)
    if report.format == "peft" and RUNTIMES[name].format == "gguf-lora":
        made = _conversions(use, comment=piece.file == "Modelfile")
        if piece.file == "Modelfile":  # whose last lines name these files
            return replace(piece, text=f"{piece.text}# These two are made so:\n{made}")
        return replace(piece, text=made + piece.text)
    return piece


def _conversions(use: Use, *, comment: bool) -> str:
    """Return the commands that create the GGUF files of base and adapter."""
    lines = []
    if use.base_gguf == "model.gguf":
        lines.append(f"loraformat convert {shlex.quote(use.pinned_base)} model.gguf --dtype f16")
    lines.append(
        f"loraformat convert {shlex.quote(use.adapter)} {shlex.quote(use.gguf)} "
        f"--base {shlex.quote(use.pinned_base)}"
    )
    return "".join(f"{'# ' if comment else ''}{line}\n" for line in lines)
