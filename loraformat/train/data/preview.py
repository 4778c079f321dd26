"""A sample as text, with what is learned of it in brackets: ⟦so⟧."""

from __future__ import annotations

from itertools import groupby

from loraformat.train.data.encode import Encoded

__all__ = ["marked"]


def marked(encoded: Encoded) -> str:
    """Return the text of some tokens, runs of learned ones between ⟦ and ⟧.

    Parameters
    ----------
    encoded : Encoded
        The first token has nothing before it and is not learned.

    Returns
    -------
    str
        Text as it stands in the data; who prints it, escapes control characters.

    Examples
    --------
    >>> sample = Encoded([1, 2, 3], [False, True, True], ["Say ", "hello", "</s>"], True)
    >>> marked(sample)
    'Say ⟦hello</s>⟧'
    """
    learned = [False, *encoded.learned[1:]]
    said = []
    for yes, run in groupby(zip(learned, encoded.shown, strict=True), lambda x: x[0]):
        text = "".join(shown for _, shown in run)
        said.append(f"⟦{text}⟧" if yes else text)
    return "".join(said)
