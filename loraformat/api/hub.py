"""``loraformat.push`` and ``loraformat.pull``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraformat.api.arguments import many
from loraformat.api.chat_templates import format_of
from loraformat.api.progress import Progress, reported

if TYPE_CHECKING:
    from loraformat.ops.pull.report import PullReport
    from loraformat.ops.push.report import PushReport

__all__ = ["pull", "push"]


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

    Parameters
    ----------
    path : str or Path
        A PEFT directory, a GGUF LoRA, ``BUNDLE/adapters/NAME``, or a bundle.
    repo : str
        ``org/name``.
    base_model : str, optional
        ``org/name[@revision]`` of the base, if the files record only a local path.
    license : str, optional
        Licence identifier as used on the Hub; that of the base by default.
    with_gguf : bool
        Also publish a GGUF version of the adapter for llama.cpp.
    base : str or Path, optional
        Base to compare names and shapes with; by default a local copy, if there is one.
    include, exclude : str or sequence of str
        Globs of files to publish as well, and of files not to publish.
    with_statistics : bool
        Also publish activation statistics.
    whole_record : bool
        Keep hashes of the training data and sample prompts in the published record.
    private : bool
        Create a new repository as private.
    revision : str, optional
        Branch to commit to; ``main`` by default.
    create_pr : bool
        Open a pull request instead of committing to the branch.
    tag, message : str, optional
        Of the commit.
    dry_run : bool
        Upload nothing; report files, their status and the card.
    progress : bool or callable
        True shows a bar on stderr; a callable gets the bytes verified and in total.

    Returns
    -------
    PushReport

    Raises
    ------
    HubError
        If the Hub refuses, or does not answer.
    """
    from loraformat.ops.push.push import push as run

    with reported(progress, "verify") as told:
        return run(
            path, repo, private=private, revision=revision, create_pr=create_pr,
            with_gguf=with_gguf, base=None if base is None else str(base), base_model=base_model,
            licence=license, include=many(include), exclude=many(exclude),
            with_statistics=with_statistics, whole_record=whole_record, tag=tag, message=message,
            dry_run=dry_run, progress=told, format_of=format_of,
        )  # fmt: skip


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

    Parameters
    ----------
    repo : str
        ``org/name`` or ``org/name@revision``.
    target : str or Path
        Appears only when all files are complete and match the Hub.
    with_base : bool
        Also download the base model it names into the Hub cache.
    include : str or sequence of str
        Globs of the files to download; by default all but pickles and weights of other frameworks.
    force, dry_run : bool
        Replace an existing target; download nothing.
    progress : bool or callable
        True shows a bar on stderr; a callable gets the bytes compared and in total.

    Returns
    -------
    PullReport

    Raises
    ------
    HubError
        If the Hub refuses or does not answer; the same call continues.
    """
    from loraformat.ops.pull.pull import pull as run

    with reported(progress, "compare") as told:
        return run(
            repo, target, with_base=with_base, include=many(include), force=force,
            dry_run=dry_run, progress=told,
        )  # fmt: skip
