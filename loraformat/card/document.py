"""Merging the generated part of a card with the text that users wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from loraformat.card.front_matter import compose, merge, split
from loraformat.errors import InputError

__all__ = ["BEGIN", "BUNDLE_TAGS", "END", "Document", "is_template", "own_words", "without_facts"]

BEGIN = "<!-- loraformat: the part between these two lines is generated; edit around it -->"
END = "<!-- loraformat: end of the generated part -->"
_PART = re.compile(rf"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
_TITLE = re.compile(r"\A\s*#[^\n]*")
#: What tags say of a bundle, and would say wrongly of what is made of it.
BUNDLE_TAGS = ("loraformat", "nf4", "4-bit", "bitsandbytes")
#: Front matter that holds for whatever is made of a model.
_LASTING = ("license", "license_name", "license_link", "language", "base_model")
#: An untouched template says this often that it says nothing.
_EMPTY_SECTIONS = 25


def is_template(text: str) -> bool:
    """Tell whether a card is the empty form that huggingface_hub and PEFT save.

    Examples
    --------
    >>> is_template("[More Information Needed]" * 30), is_template("# My adapter")
    (True, False)
    """
    return text.count("[More Information Needed]") >= _EMPTY_SECTIONS


def without_facts(text: str) -> str:
    r"""Return a card without its generated part, which describes other weights.

    Examples
    --------
    >>> without_facts(f"# Mine\n\n{BEGIN}\nrank 24\n{END}\n\nWords.\n")
    '# Mine\n\nWords.\n'
    """
    return re.sub(rf"{_PART.pattern}\n*", "", text, flags=re.DOTALL)


def own_words(text: str) -> str | None:
    r"""Return the user text of a card; the whole card if no part is generated.

    Returns
    -------
    str or None
        None if there is a generated part, and around it nothing but its title, and no licence.
        Front matter that says how the weights relate to a base goes, too.

    Examples
    --------
    >>> own_words(f"---\ntags: [nf4, x]\n---\n# A\n\n{BEGIN}\n4.1 bits\n{END}\n\nWords.\n")
    '---\ntags:\n- x\n---\n# A\n\nWords.\n'
    >>> own_words(f"# A\n\n{BEGIN}\n4.1 bits\n{END}\n") is None
    True
    """
    if not _PART.search(text):
        return text
    kept = without_facts(text)
    try:
        fields, body = split(kept)
    except InputError:  # what the Hub would not read is not ours to fix
        return kept
    if not _TITLE.sub("", body, count=1).strip():
        lasting = {key: fields[key] for key in _LASTING if key in fields}
        return compose(lasting) if "license" in lasting else None
    fields.pop("base_model_relation", None)
    if isinstance(tags := fields.get("tags"), list):
        fields["tags"] = [tag for tag in tags if tag not in BUNDLE_TAGS]
    # Our title, before a card that has one of its own.
    body = re.sub(r"\A\s*# [^\n]*\s+(?=# )", "", body)
    return (compose(fields) if fields else "") + body


@dataclass(frozen=True, slots=True)
class Document:
    """The generated part of a card.

    Attributes
    ----------
    title : str
        Heading of a card that nobody wrote before.
    body : str
        Markdown.
    fields : dict
        Front matter.
    facts : frozenset of str
        Its members that win over what was written by hand.
    first : bool
        Stands before what was written, not behind it: that was about something else.
    """

    title: str
    body: str
    fields: dict[str, Any]
    facts: frozenset[str] = frozenset()
    first: bool = False

    def render(self, written: str | None = None) -> str:
        """Return the whole card.

        Parameters
        ----------
        written : str, optional
            The card as it stands. Its words stay as they are; the generated part is put
            where it was before, or added.

        Raises
        ------
        InputError
            If its front matter cannot be read.
        """
        part = f"{BEGIN}\n\n{self.body.strip()}\n\n{END}"
        if written is None or not written.strip():
            return f"{compose(self.fields)}\n# {self.title}\n\n{part}\n"
        fields, body = split(written)
        merged = merge(fields, self.fields, facts=set(self.facts))
        if is_template(body):
            return f"{compose(merged)}\n# {self.title}\n\n{part}\n"
        if _PART.search(body):
            body = _PART.sub(lambda match: part, body, count=1)
        elif self.first:
            body = f"\n# {self.title}\n\n{part}\n\n{body.lstrip()}"
        else:
            body = f"{body.rstrip()}\n\n{part}\n"
        return compose(merged) + body
