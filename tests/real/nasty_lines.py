"""Lines of text on which tokenizers disagree, made from a seed."""

from __future__ import annotations

import random

__all__ = ["nasty_lines"]

_WORDS = [
    "the", "model", "reads", "what", "nobody", "else", "would", "write", "naïve", "façade",
    "Straße", "İstanbul", "coöperate", "WORD", "wOrD",
]  # fmt: skip
_CODE = [
    "def f(x):\n\treturn x**2  # squares", "for (int i=0;i<n;++i){a[i]=b[i]->c;}",
    "</div><br/>\r\n", "SELECT * FROM t WHERE a='b''c';", "#!/bin/sh\n\n\n",
    "x = {'a': [1, 2.5e-10, 0x1F], \"b\": None}", "https://example.org/a_b?c=%20d&e=f#g",
    "\\frac{1}{2}\\,\\alpha_{i,j}", "C:\\dir\\file.txt", "it's I'M we'Ll they'VE don't 'tis 'S",
    "a  +=  b ;;; // ---- ====", "1st 2nd 33rd 1,234,567.89",
]  # fmt: skip
_SCRIPTS = [
    "漢字かな交じり文。", "한국어 문장입니다", "これはテストです", "中文没有空格", "Привет, мир!",
    "Ελληνικά ά", "مرحبا بالعالم ١٢٣", "שלום עולם", "हिन्दी में लिखा", "ไทยไม่มีวรรค", "ქართული",
    "አማርኛ",
]  # fmt: skip
_MARKS = [
    "e\u0301", "a\u0308\u0304", "\u0ba8\u0bbf", "n\u0303o", "\u1e9e\u0323\u0307",
    "Z\u0351\u036b\u0343", "\uac00\u11a8", "\u0301", "ﬁ", "Å",
]  # fmt: skip
_EMOJI = ["🙂", "👩‍💻", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "1️⃣", "🫠🫠", "😀😃😄"]
_SPACES = [
    " ", "  ", "   ", "\t", "\t\t ", "\u00a0", "\u3000", "\u2009", "\u200b", "\n", "\n\n", "\r\n",
    " \n ", "        ", " " * 40, "\n" * 20,
]  # fmt: skip
_CONTROLS = [
    "\x01", "\x07\x08", "\x1b[31m", "\x7f", "\u0085", "\u2028", "\ufeff", "\ufffd", "\u202e",
    "\ud7ff", "\U0010ffff",
]  # fmt: skip
_DIGITS = [
    "0", "007", "12", "123", "1234", "12345678901234567890", "٣٤", "３４５", "½¾", "Ⅷ", "x²",
]  # fmt: skip
_PUNCTUATION = [
    "...", "?!", "--", "“quoted”", "«»", "—", "___", "***", "$$", "@#%", "((()))", "''''", '"""',
]  # fmt: skip
_KINDS = [_WORDS, _CODE, _SCRIPTS, _MARKS, _EMOJI, _SPACES, _CONTROLS, _DIGITS, _PUNCTUATION]


def nasty_lines(special: list[str], count: int = 300, seed: int = 0) -> list[str]:
    """Return lines that mix every kind of text.

    Parameters
    ----------
    special : list of str
        The tokenizer's own control tokens, which stand in some lines, whole and cut.
    """
    chance = random.Random(seed)
    lines = ["", " ", "\n", "a", " a", "a ", "  a  ", *special]
    pieces = [
        *_KINDS,
        special,
        [token[:-1] for token in special],
        [_any(chance) for _ in range(40)],
    ]
    while len(lines) < count:
        some = [chance.choice(chance.choice(pieces)) for _ in range(chance.randint(1, 9))]
        joints = [chance.choice(["", "", " ", chance.choice(_SPACES)]) for _ in some]
        lines.append("".join(text + joint for text, joint in zip(some, joints, strict=True)))
    return lines[:count]


def _any(chance: random.Random) -> str:
    """Return a character of any plane, but no surrogate and no NUL."""
    while True:
        code = chance.choice([chance.randrange(1, 0x3000), chance.randrange(1, 0x20000)])
        if not 0xD800 <= code < 0xE000:
            return chr(code)
