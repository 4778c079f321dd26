"""Atomic download of a repository at one commit, verified by hash.

Files are fetched into a hidden directory of the work directory, which huggingface_hub
continues after an interruption; each is compared with the Hub's hash and moved to its place;
then everything appears at once.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from loraformat import plugins
from loraformat.errors import HubError, InputError, LoraFormatError, UsageError, printable
from loraformat.hub import hub_id
from loraformat.hub.explain import explained
from loraformat.hub.repository import model_card
from loraformat.hub.source import NOT_WANTED, download
from loraformat.hub.tree import TreeFile, digest, list_files
from loraformat.hub.verified import wrong_content
from loraformat.model.report import Report
from loraformat.ops.arguments import Progress, many, reported
from loraformat.ops.opening.adapter import open_adapter
from loraformat.ops.push.base_info import BaseRef, adapter_base
from loraformat.ops.push.report import FileReport
from loraformat.storage.atomic_output import AtomicOutput
from loraformat.storage.durable import sync_directory
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import is_portable_path

__all__ = ["PullReport", "base_named_by", "pull"]

_ARRIVING = ".arriving"
_MAX_FILES = 20_000
#: Weights that nothing here reads; a GGUF file may be the adapter.
_LEFT_OUT = [glob for glob in NOT_WANTED if glob != "*.gguf"]


@dataclass(frozen=True, slots=True, repr=False)
class PullReport(Report):
    """Report of ``pull``; of a dry run, the plan.

    Attributes
    ----------
    repo, commit, target : str
    format : str or None
        What it is; None of a dry run, or if no converter knows it.
    files : list of FileReport
    left_out : list of str
    base_model, base_revision, base_path : str or None
        With ``--with-base``: where it is in the Hub's cache.
    """

    repo: str
    commit: str
    target: str
    format: str | None
    files: list[FileReport]
    left_out: list[str]
    base_model: str | None = None
    base_revision: str | None = None
    base_path: str | None = None


def pull(
    repo: str,
    target: str | Path,
    *,
    with_base: bool = False,
    include: str | Sequence[str] = (),
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = False,
) -> PullReport:
    """Download a repository from the Hub at one commit and verify every file by hash.

    `target` appears only when all files are complete and match the Hub. To continue after an
    interruption, run the same command again; complete files are not downloaded twice.

    Parameters
    ----------
    repo : str
        ``org/name`` or ``org/name@revision``.
    target : str or Path
        The directory to create.
    with_base : bool
        Also download the base model it names into the Hub cache.
    include : str or sequence of str
        Download matching files only. [default: all but pickles and weights of other
        frameworks]
    force : bool
        Replace an existing `target`.
    dry_run : bool
        Report the files and their sizes without downloading them.
    progress : bool or callable
        True shows a bar on stderr; a callable gets the bytes compared and in total.

    Returns
    -------
    PullReport

    Raises
    ------
    HubError
        If the Hub refuses or does not answer, or a file is not what it has; the same call
        continues.
    OutputError
        If the target exists.
    UsageError
        If `repo` is no repository id, or the target is empty.
    """
    began = time.perf_counter()
    named = hub_id(repo)
    if named is None:
        raise UsageError(
            f"{printable(repo)} is not a repository id: wanted ORG/NAME or ORG/NAME@REVISION"
        )
    if not str(target):
        raise UsageError("DST is empty", hint="give the directory to create")
    name, revision = named
    commit, card = model_card(name, revision)
    with explained(repo):
        tree = list_files(name, commit)
    wanted, left_out = _choose(tree, many(include), repo)
    target = Path(target)
    report = PullReport(
        repo=name,
        commit=commit,
        target=str(target),
        format=None,
        files=[FileReport(f.path, f.nbytes, f.sha256, "fetched") for f in wanted],
        left_out=left_out,
        dry_run=dry_run,
    )
    if not dry_run:
        with reported(progress, "compare") as told:
            kept = _fetch(name, commit, wanted, target, force, told)
        files = [replace(f, status="kept" if f.path in kept else "fetched") for f in report.files]
        report = replace(report, files=files, format=_format(target))
    if with_base:
        report = _add_base(report, card, target)
    return replace(report, seconds=time.perf_counter() - began)


def _choose(
    tree: dict[str, TreeFile], include: Sequence[str], word: str
) -> tuple[list[TreeFile], list[str]]:
    """Return the files to download and the skipped paths; refuse unsafe names."""
    if len(tree) > _MAX_FILES:
        raise InputError(f"holds more than {_MAX_FILES} files, no model does", path=word)
    wanted, left_out = [], []
    seen: dict[str, str] = {}
    for path in sorted(tree):
        parts = path.split("/")
        chosen = not include or any(fnmatch(path, glob) for glob in include)
        unwanted = not include and any(fnmatch(path, glob) for glob in _LEFT_OUT)
        hidden = any(part.startswith(".") for part in parts)
        if ".." not in parts and (hidden or unwanted or not chosen):
            left_out.append(path)
            continue
        if not is_portable_path(path):
            raise InputError(
                f"{printable(path)} leads out of the directory or is not a portable file name",
                path=word,
            )
        other = seen.setdefault(path.lower(), path)
        if other != path:
            raise InputError(
                f"{printable(other)} and {printable(path)} are one file on some systems", path=word
            )
        wanted.append(tree[path])
    if not wanted:
        raise InputError("has no matching file", path=word, hint="see --include")
    return wanted, left_out


def _fetch(
    repo: str,
    commit: str,
    wanted: list[TreeFile],
    target: Path,
    force: bool,
    progress: Callable[[int, int], None],
) -> set[str]:
    """Download the files into the target; return those of an interrupted run."""
    plan = f"pull {repo} {commit} {[(file.path, file.hash) for file in wanted]}"
    total = sum(file.nbytes for file in wanted)
    with AtomicOutput(target, plan=plan, force=force) as output:
        arriving = output.work / _ARRIVING
        kept = {file.path for file in wanted if (arriving / file.path).is_file()}
        output.check_space(total - sum((arriving / path).stat().st_size for path in kept))
        arriving.mkdir(exist_ok=True)
        output.record(_ARRIVING, {})  # which keeps it if we are interrupted
        _download(repo, commit, wanted, arriving)
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        for file in wanted:
            _check(SafeDirectory(arriving), file, repo, count)
        for file in wanted:
            _move(arriving / file.path, output.work, file.path)
        shutil.rmtree(arriving)
        output.commit()
    return kept


def _download(repo: str, commit: str, wanted: list[TreeFile], arriving: Path) -> None:
    from huggingface_hub import snapshot_download

    # Names are patterns here, and ours hold nothing else that is special.
    globs = [file.path.replace("[", "[[]") for file in wanted]
    with explained(repo):
        snapshot_download(repo, revision=commit, local_dir=arriving, allow_patterns=globs)


def _check(folder: SafeDirectory, file: TreeFile, repo: str, count: Callable[[int], None]) -> None:
    path = folder.path / file.path
    if not path.is_file():
        raise HubError("did not arrive", path=f"{repo}/{file.path}", hint="run again")
    with os.fdopen(folder.open(file.path), "rb") as stream:
        found = digest(stream, file, count)
        os.fsync(stream.fileno())
    if found != file.hash:
        path.unlink()
        raise wrong_content(f"{repo}/{file.path}", found, file, "run again to download it again")


def _move(source: Path, work: Path, name: str) -> None:
    place = work / name
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, place)
    for directory in place.parents:
        sync_directory(directory)
        if directory == work:
            break


def _format(path: Path) -> str | None:
    """Return the format of the download."""
    ggufs = sorted(path.glob("*.gguf"))
    for candidate in (path, *ggufs[:1]):
        try:
            return plugins.sniff(candidate).name
        except LoraFormatError:
            continue
    return None


def _add_base(report: PullReport, card: dict[str, object], target: Path) -> PullReport:
    named = base_named_by(None if report.dry_run else target, card)
    if named is None:
        note = "names no base model on the Hub; nothing else was downloaded"
        return replace(report, notes=[*report.notes, note])
    repo, revision = named
    if report.dry_run:
        return replace(report, base_model=repo, base_revision=revision)
    snapshot = download(repo, revision)
    return replace(report, base_model=repo, base_revision=snapshot.name, base_path=str(snapshot))


def base_named_by(path: Path | None, card: Mapping[str, object]) -> BaseRef | None:
    """Return the base as ``org/name`` and a revision, if one is named.

    It is named by what lies at the path (None if nothing was fetched), or by the card's front
    matter.
    """
    said = _card_base(card)
    found = None if path is None else _adapter_base(path)
    return found or ((said, None) if said else None)


def _card_base(card: Mapping[str, object]) -> str | None:
    said = card.get("base_model")
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    named = hub_id(said) if isinstance(said, str) else None
    return named[0] if named else None


def _adapter_base(path: Path) -> BaseRef | None:
    try:
        with open_adapter(path, conditional=True, inspect=True) as adapter:
            repo, revision = adapter_base(adapter, None, None)
    except LoraFormatError:  # no adapter, or a damaged one, which can be fetched all the same
        return None
    # A stranger's word for a revision: a commit is one, and a branch is not what it was.
    return repo, revision if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else None
