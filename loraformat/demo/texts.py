"""Demo texts: held-out texts, and training text from Python's documentation."""

from __future__ import annotations

from pathlib import Path

from loraformat.demo import HELDOUT
from loraformat.errors import MissingDependencyError

__all__ = ["KINDS", "heldout", "heldout_path", "manual_text"]

#: ``library``: Python source, as the model was trained on. ``manual`` and ``tests``: what the
#: adapters of these names were trained on. No model or adapter has seen these texts.
KINDS = ("library", "manual", "tests")

#: The topics of the language reference that are held out in ``heldout_manual.txt``.
_HELDOUT_TOPICS = ("assert", "import", "raise", "with")

#: Of heldout.txt, its first three modules: enough to compare models, and quick.
_LIBRARY_BYTES = 30_273


def heldout_path(kind: str) -> Path:
    """Return the file of one of the `KINDS` of text."""
    return HELDOUT if kind == "library" else HELDOUT.with_name(f"heldout_{kind}.txt")


def heldout(kind: str) -> str:
    """Read the held-out text of one of the `KINDS`.

    Examples
    --------
    >>> heldout("manual").splitlines()[0]
    'The "assert" statement'
    """
    raw = heldout_path(kind).read_bytes()
    return (raw[:_LIBRARY_BYTES] if kind == "library" else raw).decode("utf-8")


def manual_text() -> str:
    r"""Return Python's language reference, to train on: no paragraph of it is held out.

    The small model was trained on the standard library's source, but not on this. It is what
    ``help("while")`` prints. Topics share paragraphs; each is taken once, and none that stands
    in the held-out text or in this Python's own wording of the same topics.

    Raises
    ------
    MissingDependencyError
        If this Python was installed without it.

    Examples
    --------
    >>> text = manual_text()
    >>> 'The "while" statement' in text, 'The "with" statement\n***' in text
    (True, False)
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise MissingDependencyError(
            "this Python has no pydoc_data, which the demo uses as training text",
            hint="install the whole standard library",
        ) from None
    held_out = [heldout("manual"), *(topics.get(name, "") for name in _HELDOUT_TOPICS)]
    seen = {part.strip() for text in held_out for part in text.split("\n\n")}
    parts: dict[str, str] = {}
    for name in sorted(set(topics).difference(_HELDOUT_TOPICS)):
        for part in topics[name].split("\n\n"):
            if part.strip() not in seen:
                parts.setdefault(part.strip(), part.strip("\n"))
    return "\n\n".join(parts.values()) + "\n"
