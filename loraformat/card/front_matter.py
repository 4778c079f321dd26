"""Card front matter: YAML between two lines of dashes, as on the Hub."""

from __future__ import annotations

import re
from typing import Any

from loraformat.card.facts import Base, Licence
from loraformat.errors import InputError, printable

__all__ = ["compose", "licence_of", "members", "merge", "split"]

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MAX_FRONT = 64 << 10
_MAX_DEPTH = 32
#: Identifier, name and link of a licence.
_LICENCE = ("license", "license_name", "license_link")
_WANTED = "is not a YAML mapping, as the front matter of a card must be"


def split(text: str) -> tuple[dict[str, Any], str]:
    r"""Return the front matter of a card and what follows it.

    Raises
    ------
    InputError
        If there is one and it is no YAML mapping.

    Examples
    --------
    >>> split("---\nlicense: mit\n---\n# X\n")
    ({'license': 'mit'}, '# X\n')
    """
    match = _FRONT.match(text)
    if match is None:
        return {}, text.removeprefix("\ufeff")
    return _parsed(match[1] or ""), text[match.end() :]


def _parsed(raw: str) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_traps(raw)
        # An alias may stand for very much more than it is long.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(raw, loader)):
            raise InputError("it has aliases")
        found = yaml.load(raw, loader)
        compose(found)  # it is going to be written again, which 0xfff... of 5000 digits cannot be
    except Exception as error:  # KeyError for "!!bool x", AttributeError for "!!timestamp x", ...
        where = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"front matter {_WANTED}: {printable(where)}", hint="fix it") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"front matter {_WANTED}", hint="fix it")
    return found


def _refuse_traps(raw: str) -> None:
    """Refuse YAML that takes quadratic time to parse: many open brackets."""
    if len(raw) > _MAX_FRONT:
        raise InputError(f"longer than {_MAX_FRONT} characters")
    depth = 0
    for character in raw:
        depth = depth + 1 if character in "[{" else max(depth - (character in "]}"), 0)
        if depth > _MAX_DEPTH:
            raise InputError(f"more than {_MAX_DEPTH} brackets are open")


def compose(fields: dict[str, Any]) -> str:
    """Return front matter as YAML; every value is quoted as data.

    Examples
    --------
    >>> print(compose({"license": "mit", "tags": ["a: b"]}), end="")
    ---
    license: mit
    tags:
    - 'a: b'
    ---
    """
    import yaml

    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return f"---\n{text}---\n"


def members(
    base: Base, relation: str, library: str, tags: list[str], pipeline: str | None
) -> dict[str, Any]:
    """Return the members by which the Hub links a repository to its base.

    `relation` is ``adapter``, ``quantized`` or ``finetune``.
    """
    fields: dict[str, Any] = {
        "base_model": base.repo,
        "base_model_relation": relation,
        "library_name": library,
    }
    if pipeline:
        fields["pipeline_tag"] = pipeline
    if base.licence is not None:
        said = (base.licence.identifier, base.licence.name, base.licence.link)
        fields |= {key: word for key, word in zip(_LICENCE, said, strict=True) if word}
    return fields | {"tags": tags}


def licence_of(fields: dict[str, Any]) -> Licence | None:
    """Return the licence that front matter names."""
    words = [fields.get(key) for key in _LICENCE]
    identifier, name, link = (word if isinstance(word, str) and word else None for word in words)
    return Licence(identifier, name, link) if identifier else None


def merge(written: dict[str, Any], ours: dict[str, Any], *, facts: set[str]) -> dict[str, Any]:
    """Return user front matter completed by the generated one, with the tags of both.

    The members named in `facts` are no matter of opinion: ours win.

    Examples
    --------
    >>> merge({"license": "mit", "tags": ["x"]}, {"license": "bsd", "tags": ["y"]}, facts=set())
    {'license': 'mit', 'tags': ['x', 'y']}
    """
    fields = dict(written)
    for key, value in ours.items():
        if key not in fields or fields[key] in (None, "", []) or key in facts:
            fields[key] = value
    tags = written.get("tags")
    if isinstance(tags, list) and isinstance(ours.get("tags"), list):
        fields["tags"] = [*tags, *(tag for tag in ours["tags"] if tag not in tags)]
    kept = ours if "license" in facts else written if written.get("license") else fields
    for key in _LICENCE[1:]:  # which belong to the licence
        if key in kept:
            fields[key] = kept[key]
        else:
            fields.pop(key, None)
    return fields
