"""Chat templates rendered in a separate process, whose time and memory are bounded.

One process serves all templates of this one, is started for the first conversation, and ends with
it. `loraformat.chat_templates.worker` is what runs there, and says why.

A template that writes today's date is made to write the same one every day. Otherwise a run that
goes on past midnight, or is resumed the next day, would train on other tokens than it began with,
and could not be reproduced.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from functools import cache, lru_cache
from threading import Lock
from typing import Any, BinaryIO, cast
from weakref import finalize

from loraformat.chat_templates.worker import (
    LONGEST_ANSWER,
    LONGEST_TEXT,
    MEMORY,
    SECONDS,
    encoded,
    receive,
)
from loraformat.errors import InputError, LoraFormatError

__all__ = ["TemplateProcess", "TemplateRefusalError", "on_one_day", "shared"]

_CODE = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from loraformat.chat_templates.worker import serve; "
    "serve(float(sys.argv[1]), int(sys.argv[2]))"
)
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_HINT = "choose another template with --chat-template"

_DAY = date(2024, 7, 26)  # what Llama 3.2's template writes where there is no clock
_CALL = re.compile(r"""strftime_now\(\s*(?:"([^"]{0,80})"|'([^']{0,80})')\s*\)""")


class TemplateRefusalError(Exception):
    """A template is not one, or says that it does not take a conversation."""


class TemplateProcess:
    """Renders conversations in another process; any thread may ask.

    Each conversation may take `seconds` of CPU time, and `memory` bytes (enforced on Linux only).
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self._seconds, self._memory = seconds, memory
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner, self._template = 0, ""

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        prompt: bool = False,
        tokens: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> str:
        """Return a conversation as a template writes it.

        `template` is Jinja, as transformers understands it; with `prompt`, what stands before the
        assistant's next words is written, too. `tokens` are texts of special tokens, by the names
        that a template has for them; `name` says in messages whose template it is.

        Raises
        ------
        TemplateRefusalError
            If the template is none, or does not take the conversation.
        InputError
            If it computes too long, takes too much memory, or writes too much.
        """
        if not messages:
            raise TemplateRefusalError("there is no message")
        request = {
            "messages": [dict(message) for message in messages],
            "tools": tools, "prompt": prompt, "tokens": dict(tokens or {}),
        }  # fmt: skip
        with self._lock:
            answer = self._exchange(template, request, name)
        if "refused" in answer:
            raise TemplateRefusalError(answer["refused"])
        if "limit" in answer:
            what = {
                "length": f"writes more than {LONGEST_TEXT >> 20} million characters",
                "memory": f"takes more than {self._memory >> 20} MiB of memory",
            }[answer["limit"]]
            raise InputError(f"its chat template {what} for a conversation", path=name, hint=_HINT)
        return str(answer["text"])

    def _exchange(self, template: str, request: dict[str, Any], name: str) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            told = None if template == self._template else template
            try:
                process.stdin.write(encoded(request | {"template": told}))
                process.stdin.flush()
                answer = receive(cast(BinaryIO, process.stdout), LONGEST_ANSWER)
            except BrokenPipeError:
                answer = None
            if answer is None:
                raise self._ended(process, name)
        except BaseException:  # also an interrupt: its answer must not be taken for the next one's
            self.close()
            raise
        self._template = template
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is not None and self._owner == os.getpid() and process.poll() is None:
            return process
        # A session of its own: Ctrl-C is for this process, which may have a step to finish.
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(self._seconds), str(self._memory), *sys.path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, **_ONE_THREAD},
        )  # fmt: skip
        self._process, self._owner, self._template = process, os.getpid(), ""
        finalize(self, _end, process, self._owner)
        return process

    def _ended(self, process: subprocess.Popen[bytes], name: str) -> LoraFormatError:
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return LoraFormatError("the process that renders chat templates gave a wrong answer")
        if code == -signal.SIGPROF:
            return InputError(
                f"its chat template computes for more than {self._seconds:g} seconds over one "
                "conversation",
                path=name,
                hint=_HINT,
            )
        return LoraFormatError(f"the process that renders chat templates ended with code {code}")

    @property
    def number(self) -> int | None:
        """The process's number in the system; None if it does not run."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def close(self) -> None:
        """End the process; the next conversation starts another."""
        if self._process is not None:
            _end(self._process, self._owner)
        self._process = None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():  # a fork's copy of what belongs to its parent
        return
    process.kill()
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        with suppress(BrokenPipeError):  # what was not written any more
            stream.close()
    process.wait()


@cache
def shared() -> TemplateProcess:
    """Return the one of this process."""
    return TemplateProcess()


@lru_cache(maxsize=8)
def on_one_day(template: str) -> str:
    """Return a Jinja template in which ``strftime_now`` knows one day only: 26 July 2024.

    Examples
    --------
    >>> on_one_day("{{ bos_token }}")
    '{{ bos_token }}'
    >>> on_one_day("{{ strftime_now('%Y') }}").endswith("{{ '2024' }}")
    True
    """

    def written(call: re.Match[str]) -> str:
        return repr(_DAY.strftime(call[1] or call[2] or ""))

    fixed = _CALL.sub(written, template)
    if "strftime_now(" not in fixed:
        return fixed
    # A format that is put together in the template; +%} keeps a line end that follows.
    return f"{{%- macro strftime_now(format) -%}}{_DAY.isoformat()}{{%- endmacro +%}}{fixed}"
