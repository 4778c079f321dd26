"""Publishing an adapter or a bundle in one verified commit.

::

    files ── verify ──> contents + card ── compare with the Hub ──> one commit ──> tag
                                                                        │
                                       every hash compared again <──────┘
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from loraformat.errors import HubError, InputError, UsageError, printable
from loraformat.hub import hub_id, resolve
from loraformat.hub.repository import (
    Commit,
    Repository,
    State,
    is_logged_in,
    is_reference,
    require_login,
)
from loraformat.hub.source import download
from loraformat.hub.tree import TreeFile
from loraformat.ops.arguments import Progress, many
from loraformat.ops.push.files import PushOptions, UploadFile, read_card
from loraformat.ops.push.report import FileReport, PushReport
from loraformat.ops.push.upload_plan import UploadPlan, gguf_pattern, plan_upload
from loraformat.ops.verify import verify
from loraformat.storage.safe_directory import SafeDirectory
from loraformat.storage.safe_paths import CARD_NAME
from loraformat.version import __version__

__all__ = ["push"]


def push(
    path: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    with_gguf: bool = False,
    base: str | Path | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    with_statistics: bool = False,
    whole_record: bool = False,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
    progress: Progress = False,
) -> PushReport:
    """Publish an adapter or a bundle on the Hub with a generated model card.

    `path` is a PEFT directory, a GGUF LoRA, ``BUNDLE/adapters/NAME``, or a bundle. It is verified
    first and published in a single commit, whose files are then compared by hash. Files already on
    the Hub are not uploaded again, so an interrupted upload resumes where it stopped.

    Log in with: hf auth login.

    Parameters
    ----------
    path : str or Path
        What to publish.
    repo : str
        ``org/name``.
    base_model : str, optional
        Base model on the Hub, if the files record only a local path. ORG/NAME@REVISION selects a
        revision.
    license : str, optional
        Licence identifier as used on the Hub. [default: that of the base]
    with_gguf : bool
        Also publish a GGUF version of the adapter for llama.cpp.
    base : str or Path, optional
        Base to compare names and shapes with; its ``config.json`` is used for `with_gguf`.
        [default: a local copy, if there is one]
    include : str or sequence of str
        Also publish matching files of `path`.
    exclude : str or sequence of str
        Do not publish matching files of `path`.
    with_statistics : bool
        Also publish activation statistics: second moments of layer inputs on the training data.
    whole_record : bool
        Keep hashes of the training data and sample prompts in the published training_record.json.
    private : bool
        Create a new repository as private.
    revision : str, optional
        Branch to commit to; created if missing. [default: main]
    create_pr : bool
        Open a pull request instead of committing to the branch.
    tag : str, optional
        Tag the commit, for example v1.0.
    message : str, optional
        Commit message.
    dry_run : bool
        Report the files, their status on the Hub, and the model card, without uploading.
    progress : bool or callable
        True shows a bar on stderr; a callable gets the bytes verified and in total.

    Returns
    -------
    PushReport

    Raises
    ------
    InputError
        If the files are not sound, or do not say what their base is.
    HubError
        If the Hub refuses, or does not answer.
    """
    began = time.perf_counter()
    options = PushOptions(
        repo, with_gguf, None if base is None else str(base), base_model, license,
        many(include), many(exclude), with_statistics, whole_record, dry_run,
    )  # fmt: skip
    _check(repo, revision, create_pr, tag)
    if not dry_run:
        require_login()
    found = resolve(path).path
    remote = Repository(repo, revision or "main")
    with tempfile.TemporaryDirectory(prefix="loraformat-") as workplace:
        plan = plan_upload(found, options, Path(workplace), lambda: _verify(found, progress))
        asked, state = _state(remote, plan, private, dry_run)
        files, report = _planned(plan, state, remote, asked=asked)
        report = replace(report, source=str(path), tag=tag if dry_run else None, dry_run=dry_run)
        if not dry_run:
            parent, there = _ready(remote, state, private=private, create_pr=create_pr)
            known = _check_tag(remote, tag, parent, report.changed)
            done = Commit(parent, remote.url, parent)
            if report.changed:
                same = {file.path for file in report.files if file.status == "same"}
                done = remote.commit(
                    {file.path: file.content for file in files if file.path not in same},
                    [path for path in report.removed if path in there],
                    parent=parent,
                    message=message or f"Upload {report.kind} with loraformat {__version__}",
                    pull_request=create_pr,
                )
            _compare(remote, done, files)
            if tag is not None and not known:
                remote.tag(tag, done.oid)
            report = replace(report, commit=done.oid, pull_request=done.pull_request, tag=tag)
    return replace(report, seconds=time.perf_counter() - began)


def _check(repo: str, revision: str | None, create_pr: bool, tag: str | None) -> None:
    if hub_id(repo) != (repo, None):
        raise UsageError(f"{printable(repo)} is not a repository id: wanted ORG/NAME")
    for option, name in (("--tag", tag), ("--revision", revision)):
        if name is not None and not is_reference(name):
            raise UsageError(
                f"{option} {printable(name)!r} is not a valid name for a branch or a tag",
                hint="use letters, digits, '.', '-' and '_', v1.0 for example",
            )
    if create_pr and (tag or revision not in (None, "main")):
        raise UsageError(
            "--create-pr targets main and cannot be combined with a tag",
            hint="omit --tag and --revision; tag it when it is merged",
        )


def _verify(path: Path, progress: Progress) -> None:
    findings = verify(path, progress=progress).findings
    if findings:
        first = findings[0]
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        raise InputError(
            f"is invalid: {first.rule}{': ' if first.rule else ''}{first.problem}{more}",
            path=first.path,
            hint=f"run: loraformat verify {path}",
        )


def _state(
    remote: Repository, plan: UploadPlan, private: bool, dry_run: bool
) -> tuple[bool, State | None]:
    """Return whether the Hub answered, which a dry run does not need, and the current state."""
    try:
        state = remote.state()
    except HubError as error:
        if not dry_run:
            raise
        plan.contents.notes.append(f"the Hub was not queried about {remote.repo}: {error.problem}")
        return False, None
    if state is None and not is_logged_in():
        plan.contents.notes.append(
            f"the Hub shows no {remote.repo} without a login; it may be private"
        )
    if state is not None and private and not state.private:
        raise HubError(
            "exists and is public; --private only applies to new repositories",
            path=remote.repo,
            hint="change it in its settings on the Hub, then push without --private",
        )
    return True, state


def _planned(
    plan: UploadPlan, state: State | None, remote: Repository, *, asked: bool
) -> tuple[list[UploadFile], PushReport]:
    """Return the files with the card, and what will be reported of them."""
    there, contents = state.files if state else {}, plan.contents
    card = _card(plan, state, remote.repo)
    files = [*contents.files, UploadFile.of_bytes(CARD_NAME, card.encode("utf-8"))]
    status = {
        file.path: _status(file, there.get(file.path)) if asked else "not asked" for file in files
    }
    ordered = sorted(files, key=lambda file: file.path)
    return files, PushReport(
        source="",
        repo=remote.repo,
        url=remote.url,
        kind=plan.kind,
        base_model=plan.base.repo,
        files=[FileReport(f.path, f.nbytes, f.sha256, status[f.path]) for f in ordered],
        removed=_stale(plan, remote.repo, status, there),
        left_out=contents.left_out,
        card=card,
        notes=contents.notes,
    )


def _card(plan: UploadPlan, state: State | None, repo: str) -> str:
    """Return the card with the local user text, or that on the Hub if there is none."""
    here, there = plan.contents.card, None
    if state and CARD_NAME in state.files:
        there = read_card(SafeDirectory(download(repo, state.commit, only=CARD_NAME)))
    card = plan.document.render(there if here is None else here)
    if here is not None and there is not None and plan.document.render(there) != card:
        plan.contents.notes.append(
            "README.md on the Hub differs and is replaced by the local one; the old version stays "
            "in the history"
        )
    return card


def _status(file: UploadFile, there: TreeFile | None) -> str:
    if there is None:
        return "new"
    return "same" if file.matches(there) else "changed"


def _stale(plan: UploadPlan, repo: str, status: dict[str, str], there: Iterable[str]) -> list[str]:
    """Return files of an earlier push that would contradict this one."""
    globs = plan.replaces
    if any(state != "same" for path, state in status.items() if path.endswith(".safetensors")):
        globs += (gguf_pattern(repo),)  # which was made of other weights
    return sorted(path for path in there if path not in status and _any(path, globs))


def _any(path: str, globs: Iterable[str]) -> bool:
    """Tell whether some glob matches a path; one without a slash matches only top-level files."""
    return any(fnmatch(path, g) and ("/" in g or "/" not in path) for g in globs)


def _ready(
    remote: Repository, state: State | None, *, private: bool, create_pr: bool
) -> tuple[str, set[str]]:
    """Return the parent commit and its files; create repository and branch if needed."""
    if state is None:
        if create_pr:
            raise HubError(
                "does not exist, so no pull request can be opened",
                path=remote.repo,
                hint="push without --create-pr first",
            )
        remote.create(private=private)
        state = remote.state()
    if state is not None and not state.has_branch:
        remote.create_branch()
    if state is None:
        raise HubError(
            "was created, but the Hub does not show it", path=remote.repo, hint="run again"
        )
    return state.commit, set(state.files)


def _check_tag(remote: Repository, tag: str | None, commit: str, changed: bool) -> bool:
    """Tell whether the tag already exists on the current commit; refuse if it is elsewhere."""
    if tag is None:
        return False
    there = remote.tags().get(tag)
    if there is not None and (changed or there != commit):
        raise HubError(
            f"has a tag {printable(tag)} already, on commit {there[:12]}",
            path=remote.repo,
            hint="choose another tag",
        )
    return there is not None


def _compare(remote: Repository, done: Commit, files: list[UploadFile]) -> None:
    """Verify that the commit has every file with the expected hash."""
    there = remote.files(done.revision)
    wrong = sorted(file.path for file in files if not file.matches(there.get(file.path)))
    if wrong:
        raise HubError(
            f"commit {done.oid[:12]} does not match the uploaded files: {', '.join(wrong[:5])}",
            path=remote.repo,
            hint="a file may have changed during the upload; run again",
        )
