"""The pieces that a chat template puts around what people say, found by rendering it.

A conversation of one turn shows what stands before the question and between question and answer;
one of two turns, what stands behind the answer, and that nothing else is different: a template that
writes a first turn otherwise than later ones (with a system's words of its own, for example) has no
such pieces. What the template adds for a system's words is what a question with them has more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraformat.runtimes.chat import ChatFormat
from loraformat.train.data.template_date import on_one_day
from loraformat.train.data.template_probe import TemplateTrials
from loraformat.train.data.template_process import TemplateRefusalError, shared
from loraformat.train.data.text_search import common_prefix

__all__ = ["chat_format", "format_of_template"]

_ASKED, _SAID, _MORE, _SYSTEM = "Xask1X", "Xsay1X", "Xask2X", "Xsys1X"


def chat_format(trials: TemplateTrials, bos: str | None) -> ChatFormat | None:
    """Return the pieces of a template; None if it has none.

    Parameters
    ----------
    trials : TemplateTrials
    bos : str or None
        The first token, which runtimes put before a text by themselves.
    """
    try:
        asked = _asked(trials, bos, ("user", _ASKED))
        long = _asked(trials, bos, ("user", _ASKED), ("assistant", _SAID), ("user", _MORE))
    except TemplateRefusalError:
        return None
    before, found, answer = asked.partition(_ASKED)
    start, finish = f"{before}{_ASKED}{answer}", f"{before}{_MORE}{answer}"
    head, said, tail = long.partition(_SAID)
    # White space before an answer is the answer's: "[/INST] answer".
    fits = found and said and head.startswith(start) and not head[len(start) :].strip()
    if not fits or not tail.endswith(finish) or _ASKED in tail or answer.count(_ASKED):
        return None
    end = tail[: len(tail) - len(finish)]
    begin, system, user = _system(trials, bos, before, answer)
    return ChatFormat(begin, system, user, answer, end)


def format_of_template(template: str, special: Mapping[str, str]) -> ChatFormat | None:
    """Return the pieces of a template that no tokenizer is opened for.

    Parameters
    ----------
    template : str
        Jinja.
    special : mapping of str to str
        Texts of special tokens by kind: ``bos``, ``eos``, ...

    Raises
    ------
    InputError
        If it takes more than its share of time or memory.
    """
    tokens = {f"{kind}_token": text for kind, text in special.items()}

    def render(messages: list[dict[str, Any]], prompt: bool) -> str:
        return shared().render(on_one_day(template), messages, prompt=prompt, tokens=tokens)

    trials = TemplateTrials(render, special.values())
    return None if trials.mute else chat_format(trials, special.get("bos"))


def _system(
    trials: TemplateTrials, bos: str | None, before: str, answer: str
) -> tuple[str, tuple[str, str] | None, str]:
    """Return what stands before, around and behind a system's words, up to the question."""
    nothing = "", None, before
    try:
        told = _asked(trials, bos, ("system", _SYSTEM), ("user", _ASKED))
    except TemplateRefusalError:
        return nothing
    lead = told.removesuffix(_ASKED + answer)
    begin = common_prefix(before, lead)
    rest = before[len(begin) :]
    if lead == told or not lead.endswith(rest) or len(lead) < len(before):
        return nothing
    system = lead[len(begin) : len(lead) - len(rest)]
    # "<|im_start|>" begins both a system's words and the question: it belongs to what follows.
    if begin and system.endswith(begin):
        begin, system, rest = "", begin + system.removesuffix(begin), begin + rest
    around = system.split(_SYSTEM)
    return (begin, (around[0], around[1]), rest) if len(around) == 2 else nothing


def _asked(trials: TemplateTrials, bos: str | None, *turns: tuple[str, str]) -> str:
    messages: list[dict[str, Any]] = [{"role": role, "content": said} for role, said in turns]
    text = trials.render(messages, prompt=True) + trials.header
    return text.removeprefix(bos) if bos else text
