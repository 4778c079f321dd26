"""The base model on the Hub of an adapter or a bundle."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraformat.card import Base, Licence
from loraformat.card.front_matter import licence_of
from loraformat.errors import HubError, UnsupportedError, UsageError, printable
from loraformat.hub import hub_id
from loraformat.hub.repository import model_card
from loraformat.hub.source import cached
from loraformat.model.adapter import Adapter
from loraformat.storage import strict_json

__all__ = ["BaseRef", "LocalBase", "adapter_base", "bundle_base", "local_base", "look_up"]

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_HINT = "give it with --base-model ORG/NAME"

#: A repository and the revision that is known of it.
BaseRef = tuple[str, str | None]


def adapter_base(
    adapter: Adapter, option: str | None, bundle_source: Mapping[str, str] | None
) -> BaseRef:
    """Return the base that the user (``org/name``, ``org/name@revision``) or the adapter names.

    ``bundle_source`` is the ``source`` of the bundle that the adapter lies in.

    Raises
    ------
    UnsupportedError
        If only a local path is known, or nothing at all.
    """
    if option is not None:
        return _said(option)
    for name, revision in _known(adapter, bundle_source):
        if (found := hub_id(name)) is not None and not os.path.lexists(name):
            return found[0], found[1] or revision
    what = "names no base model"
    if adapter.base_model:
        what = f"names its base {printable(adapter.base_model)}, which is not a model on the Hub"
    raise UnsupportedError(what, path=adapter.path, hint=_HINT)


def bundle_base(source: Mapping[str, str], option: str | None, path: str) -> BaseRef:
    """Return the model that a bundle was made from.

    Raises
    ------
    UnsupportedError
        If it was made from local files, and the user does not say from which.
    """
    if option is not None:
        return _said(option)
    if "repo" in source and hub_id(source["repo"]):
        return source["repo"], source.get("revision")
    raise UnsupportedError(
        "was made from local files and does not record which model it is", path=path, hint=_HINT
    )


def _said(option: str) -> BaseRef:
    found = hub_id(option)
    if found is None:
        raise UsageError(f"--base-model {printable(option)}: wanted ORG/NAME, or ORG/NAME@REVISION")
    return found


def _known(
    adapter: Adapter, bundle_source: Mapping[str, str] | None
) -> Iterator[tuple[str, str | None]]:
    """Yield the known statements about the base, best first."""
    for source in (_json(adapter.base_source), bundle_source or {}):
        if isinstance(source.get("repo"), str):
            yield source["repo"], _text(source.get("revision"))
    if adapter.base_model:
        yield adapter.base_model, _text(adapter.config.get("revision"))


def _json(text: str | None) -> dict[str, Any]:
    try:
        found = strict_json.loads(text.encode("utf-8")) if text else {}
    except strict_json.StrictJsonError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str | None:
    """Return a revision that is safe to show in a card, or None."""
    tame = isinstance(value, str) and re.fullmatch(r"[\w./-]{1,200}", value, re.ASCII)
    return str(value) if tame else None


def look_up(named: BaseRef, licence: str | None, notes: list[str], *, offline_ok: bool) -> Base:
    """Look up the base and its licence on the Hub.

    Parameters
    ----------
    named : tuple
    licence : str or None
        What the user says instead.
    notes : list of str
        Gets what a user should know.
    offline_ok : bool
        What the Hub says, or that it does not answer, is a note, not an error.

    Raises
    ------
    HubError
        If there is no such model, or not in that revision.
    UsageError
        If the licence has no form that the Hub takes.
    """
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise UsageError(
            f"--license {printable(licence)}: wanted an identifier of the Hub's, apache-2.0 for "
            "example"
        )
    repo, revision = named
    what = f"base model {repo}@{revision}" if revision else f"base model {repo}"
    said = Licence(licence) if licence else None
    try:
        commit, card = model_card(repo, revision)
    except HubError as error:
        if not offline_ok:
            raise HubError(error.problem, path=what, hint=error.hint) from error
        notes.append(f"{what}: {error.problem}")
        return Base(repo, revision, said)
    # A branch or a tag moves; the commit that it is now is what the card can name.
    return Base(repo, commit if revision else None, said or licence_of(card))


@dataclass(frozen=True, slots=True)
class LocalBase:
    """A base on this machine, and what a user would call it on the command line."""

    path: str | Path
    word: str


def local_base(given: str | None, named: str | None, base: Base) -> LocalBase | None:
    """Return the base ``given`` with ``--base``, otherwise one that needs no download.

    ``named`` is what the adapter's config names, a local path perhaps. The Hub's cache may have
    ``base``, or no more than its config.
    """
    if given is not None:
        return LocalBase(given, given)
    if named is not None and Path(named).is_dir():
        return LocalBase(named, named)
    found = cached(base.repo, base.revision)
    at = f"@{base.revision}" if base.revision else ""
    return None if found is None else LocalBase(found, f"{base.repo}{at}")
