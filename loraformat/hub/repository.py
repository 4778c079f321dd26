"""A writable model repository on the Hub: state, atomic commit, tag."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraformat.errors import HubError
from loraformat.hub.explain import explained
from loraformat.hub.tree import TreeFile, hub_client, list_files

__all__ = [
    "Commit",
    "Repository",
    "State",
    "is_logged_in",
    "is_reference",
    "model_card",
    "require_login",
]

#: ``git check-ref-format``, a hyphen in front (an option to git), and what looks like a commit.
_REFUSED = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/]|[/.]$|(?:^|/)\.|\.lock(?:/|$)|"
    r"^(?:@|HEAD|[0-9a-f]{40})?$"
)
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class State:
    """State of a repository before a commit.

    Attributes
    ----------
    private : bool
    commit : str
        Where the branch points, or would begin.
    files : dict of str to TreeFile
        What that commit holds, by path.
    has_branch : bool
        Whether there is such a branch already.
    """

    private: bool
    commit: str
    files: dict[str, TreeFile]
    has_branch: bool = True


@dataclass(frozen=True, slots=True)
class Commit:
    """Result of a commit.

    Attributes
    ----------
    oid : str
    url : str
    revision : str
        A name under which its files can be listed.
    pull_request : str or None
        Its address.
    """

    oid: str
    url: str
    revision: str
    pull_request: str | None = None


def is_reference(name: str) -> bool:
    """Tell whether a branch or a tag may have this name.

    Examples
    --------
    >>> [is_reference(name) for name in ("v1.0", "feature/x", "v1..0", "a b", "", "HEAD")]
    [True, True, False, False, False, False]
    """
    return len(name) <= _LONGEST and _REFUSED.search(name) is None


def is_logged_in() -> bool:
    """Tell whether huggingface_hub has a token, without reading it."""
    from huggingface_hub import get_token

    return bool(get_token())


def require_login() -> None:
    """Raise HubError unless the user is logged in."""
    if not is_logged_in():
        raise HubError("not logged in on this machine", hint="run: hf auth login")


def model_card(repo: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """Fetch the commit of a model on the Hub, and the front matter of its card.

    Raises
    ------
    HubError
        If there is none, or it cannot be reached.
    """
    with explained(repo):
        info = hub_client().model_info(repo, revision=revision)
    return info.sha or "", info.card_data.to_dict() if info.card_data is not None else {}


class Repository:
    """One branch of a model repository, ``org/name``.

    Every method raises HubError if the Hub cannot be reached or refuses.
    """

    def __init__(self, repo: str, branch: str = "main") -> None:
        self.repo, self.branch = repo, branch
        self._api = hub_client()

    @property
    def url(self) -> str:
        """URL of its web page."""
        return f"{self._api.endpoint}/{self.repo}"

    def state(self) -> State | None:
        """Return the current state; None if the repository does not exist."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with explained(self.repo):
            has_branch = True
            try:
                info = self._api.model_info(self.repo, revision=self.branch)
            except RevisionNotFoundError:
                info, has_branch = self._api.model_info(self.repo), False
            except RepositoryNotFoundError:
                return None
            return State(bool(info.private), info.sha, self.files(info.sha), has_branch)

    def files(self, revision: str) -> dict[str, TreeFile]:
        """List the files of a revision."""
        with explained(self.repo):
            return list_files(self.repo, revision)

    def create(self, *, private: bool) -> None:
        """Create the repository."""
        with explained(self.repo):
            self._api.create_repo(self.repo, private=private or None, exist_ok=True)

    def create_branch(self) -> None:
        """Create the branch at the commit of ``main``."""
        with explained(self.repo):
            self._api.create_branch(self.repo, branch=self.branch, exist_ok=True)

    def commit(
        self,
        files: Mapping[str, Path | bytes],
        removed: Iterable[str],
        *,
        parent: str,
        message: str,
        pull_request: bool,
    ) -> Commit:
        """Upload files, by path in the repository, and commit them atomically.

        Contents go first, and those that the Hub has already (from an interrupted run, too) are
        not sent again; the commit that names them and the removed paths is one request.

        Raises
        ------
        HubError
            If the branch is no longer at `parent`; nothing has changed then.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        operations += [CommitOperationDelete(path, is_folder=False) for path in removed]
        with explained(self.repo):
            done = self._api.create_commit(
                self.repo,
                operations,
                commit_message=message,
                revision=self.branch,
                parent_commit=parent,
                create_pr=pull_request,
            )
        return Commit(done.oid, str(done), done.pr_revision or done.oid, done.pr_url)

    def tags(self) -> dict[str, str]:
        """Return the commit of each tag."""
        with explained(self.repo):
            refs = self._api.list_repo_refs(self.repo)
        return {tag.name: tag.target_commit for tag in refs.tags}

    def tag(self, name: str, commit: str) -> None:
        """Create a tag for a commit."""
        with explained(self.repo):
            self._api.create_tag(self.repo, tag=name, revision=commit)
