"""Error messages for failures of the Hub and the network."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from loraformat.errors import HubError, LoraFormatError, ResourceError, printable

__all__ = ["explained"]

_LOGIN = "run: hf auth login"
#: Of ours, not of the network.
_MISTAKES = (AssertionError, AttributeError, NameError, TypeError)


@contextlib.contextmanager
def explained(what: str, *, word: bool = False) -> Iterator[None]:
    """Context that converts huggingface_hub exceptions to loraformat errors.

    `what` is the repository, or the word that the user gave; with `word`, that may have been meant
    as a local path.
    """
    try:
        yield
    except (LoraFormatError, *_MISTAKES):
        raise
    except Exception as error:  # its tree is wide: HTTP, offline, cache, validation, OSError
        raise _explain(error, what, word) from error


def _explain(error: Exception, what: str, word: bool) -> LoraFormatError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            "the disk of the Hub's cache is full",
            path=what,
            hint="free some space, or name another directory with HF_HOME",
        )
    # What the cache lacks is told first; why it was asked at all is the cause.
    links = [link for link in (error.__cause__, error) if link is not None]
    if said := _known(links, word) or _by_status(links):
        return HubError(said[0], path=what, hint=said[1])
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return HubError(
            f"the Hub does not accept the card: {printable(' '.join(str(error).split()))}",
            path=what,
            hint="fix the front matter of README.md",
        )
    begins = (
        "is not a local path and cannot be downloaded from the Hub" if word else "the Hub failed"
    )
    return HubError(
        f"{begins} ({_reason(error)})", path=what, hint="check the network and try again"
    )


def _known(links: list[BaseException], word: bool) -> tuple[str, str] | None:
    from huggingface_hub import errors

    nowhere = "is neither a local path nor" if word else "is not"
    login = f"for a private repository {_LOGIN}"
    reasons = (
        (errors.GatedRepoError, "is gated", f"accept its terms on the Hub, then {_LOGIN}"),
        (
            errors.RevisionNotFoundError,
            "has no such revision",
            "see its branches and tags on the Hub",
        ),
        (
            errors.RepositoryNotFoundError,
            f"{nowhere} a repository on the Hub",
            f"check the spelling; {login}",
        ),
        (errors.HFValidationError, f"{nowhere} a valid Hub id", "check the spelling"),
        (
            errors.OfflineModeIsEnabled,
            "is not in the cache, and HF_HUB_OFFLINE is set",
            "unset it, or use a local path",
        ),
        (errors.LocalTokenNotFoundError, "not logged in on this machine", _LOGIN),
    )
    for kind, problem, hint in reasons:
        if any(isinstance(link, kind) for link in links):
            return problem, hint
    return None


def _by_status(links: list[BaseException]) -> tuple[str, str] | None:
    status, error = next(((s, link) for link in links if (s := _status(link))), (0, links[0]))
    said = {
        401: ("the Hub rejects the token", _LOGIN),
        403: (
            "the token lacks permission for this",
            f"use a token with access to that repository: {_LOGIN}",
        ),
        412: (
            "was changed by someone else in the meantime",
            "run again; it starts from the new state",
        ),
        413: ("the Hub rejects it as too large", "use a smaller --max-shard-size"),
        429: ("rate limited by the Hub (HTTP status 429)", "try again in a few minutes"),
    }
    if status == 400:
        words = printable(getattr(error, "server_message", None) or "HTTP status 400")
        return f"the Hub rejects the request: {words}", "fix that and run again"
    return said.get(status)


def _status(error: BaseException) -> int | None:
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _reason(error: BaseException) -> str:
    """Return the innermost cause: an HTTP status or the system's message."""
    while error.__cause__ is not None:
        error = error.__cause__
    if status := _status(error):
        return f"HTTP status {status}"
    return printable(f"{type(error).__name__}: {error}".rstrip(": "))
