"""The process that renders chat templates for `loraformat.chat_templates.process`, bounded.

A template is a program of a stranger's. transformers' sandbox keeps it from files and from
Python's insides, but not from computing for ever or from asking for all memory; nor can a thread
be stopped inside ``9 ** (9 ** 9)``. So it runs in a process of its own that the kernel ends when
one conversation has taken its seconds of CPU time, and that is refused memory beyond its share.

Requests and answers are JSON, each behind its length in eight bytes, little-endian. Nothing
that a template says is unpickled.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["LONGEST_ANSWER", "LONGEST_TEXT", "MEMORY", "SECONDS", "encoded", "receive", "serve"]

#: CPU seconds for one conversation.
SECONDS = 10.0
#: Bytes of address space beyond what the process has when it is ready; Linux only.
MEMORY = 1 << 30
#: Most characters of a rendered conversation, and bytes of an answer: six for a control character.
LONGEST_TEXT = 32 << 20
LONGEST_ANSWER = 6 * LONGEST_TEXT + 1024


def encoded(members: dict[str, Any]) -> bytes:
    """Return a message as it travels."""
    # What is no JSON is shown to a template by its type's name, as transformers does it.
    text = json.dumps(
        members, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>"
    )
    data = text.encode("utf-8", "surrogatepass")
    return len(data).to_bytes(8, "little") + data


def receive(stream: BinaryIO, longest: int | None = None) -> dict[str, Any] | None:
    """Read one message of at most `longest` bytes.

    None at the end of the stream, and instead of a message that is cut short or too long.

    Examples
    --------
    >>> from io import BytesIO
    >>> message = encoded({"text": "hi"})
    >>> receive(BytesIO(message)), receive(BytesIO(message[:-1]))
    ({'text': 'hi'}, None)
    """
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    if len(head) < 8 or (longest is not None and size > longest):
        return None
    data = stream.read(size)
    members: dict[str, Any] | None = json.loads(data) if len(data) == size else None
    return members


def serve(seconds: float, memory: int) -> None:
    """Answer requests on stdin until it ends.

    SIGPROF ends the process when one has taken `seconds` of CPU time; `memory` is in bytes.
    """
    import_module("transformers.utils.chat_template_utils")  # which the limits are not for
    requests, answers = sys.stdin.buffer, FileIO(os.dup(1), "w")
    os.dup2(2, 1)  # a stray print is no answer
    # Whoever started this may ignore the signal, or block it.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    _limit_memory(memory)
    template = ""
    while (request := receive(requests)) is not None:
        template = request["template"] or template
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(template, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            _write_all(answers, answer)
        except BrokenPipeError:  # nobody waits for it any more
            return


def _answer(template: str, request: dict[str, Any]) -> bytes:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(
            conversations=[request["messages"]], tools=request["tools"],
            chat_template=template, add_generation_prompt=request["prompt"], **request["tokens"],
        )  # fmt: skip
        return encoded({"text": text} if len(text) <= LONGEST_TEXT else {"limit": "length"})
    except MemoryError:
        return encoded({"limit": "memory"})
    except Exception as error:  # jinja2's own, and whatever a template makes of odd messages
        return encoded({"refused": str(error)[:1000] or type(error).__name__})


def _write_all(stream: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[stream.write(left) or 0 :]


def _limit_memory(beyond: int) -> None:
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no Linux: it would be a limit of what is mapped, which is not known
        return
    most = pages * resource.getpagesize() + beyond
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
