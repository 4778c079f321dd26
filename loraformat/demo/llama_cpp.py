"""Running llama.cpp through xllamacpp in a subprocess.

The library may abort the process that it runs in, and it talks on both streams; so a child
runs it, and the child's last word is a file. Nothing is sampled: a distribution
is asked for after every prefix of a text, and the likeliest tokens after a prompt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from loraformat.errors import LoraFormatError

__all__ = ["Answer", "Question", "ask", "is_installed", "serve"]

_TIMEOUT = 120

#: Nothing is imported from the directory that the demo happens to be run in.
_CHILD = """\
import sys
sys.path = [place for place in sys.path if place]
from loraformat.demo.llama_cpp import serve
serve(sys.argv[1])
"""


@dataclass(frozen=True, slots=True)
class Question:
    """A question to llama.cpp: how it cuts `text`, what follows `ids`, and `prompt`.

    Asked for are the distribution over the `vocabulary` after each of `ids`, and at most `length`
    tokens after `prompt`. `ordinary` is a token that is a letter or a word: the server gives no
    probabilities beside one that ends the text, or that is half a character.
    """

    text: str
    ids: list[int]
    prompt: list[int]
    length: int
    vocabulary: int
    ordinary: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of llama.cpp: tokens of the text, without any that begins it, and what follows.

    `log_probabilities` are natural logarithms, one row for each of the question's `ids`, by token;
    `written` is the likeliest token each time, after the prompt.
    """

    tokens: list[int]
    log_probabilities: list[list[float]]
    written: list[int]


def is_installed() -> bool:
    """Tell whether xllamacpp is installed."""
    return find_spec("xllamacpp") is not None


def ask(model: Path, question: Question, adapter: Path | None = None) -> Answer:
    """Load a GGUF file, optionally with one of LoRA factors, and ask.

    Everything is computed in float32, without flash attention.

    Raises
    ------
    LoraFormatError
        If llama.cpp refuses a file, or dies.
    """
    request = {"model": str(model), "adapter": adapter and str(adapter), **asdict(question)}
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch, "answer.json")
        command = [sys.executable, "-c", _CHILD, str(answer)]
        try:
            done = subprocess.run(
                command, input=json.dumps(request), stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True, errors="replace", timeout=_TIMEOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LoraFormatError(
                f"llama.cpp has not answered within {_TIMEOUT} seconds", path=model
            ) from None
        if done.returncode or not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise LoraFormatError(f"llama.cpp failed (exit {done.returncode}): {last}", path=model)
        return Answer(**json.loads(answer.read_text()))


# --- in the child -------------------------------------------------------------------------------


def serve(path: str) -> NoReturn:
    """Answer the question on stdin into a file, and end the process."""
    import xllamacpp

    request = json.loads(sys.stdin.read())
    server = xllamacpp.Server(_parameters(xllamacpp, request))
    url = server.listening_address
    split = {"content": request["text"], "add_special": False}
    continued = {
        "prompt": request["prompt"], "n_predict": request["length"], "temperature": 0,
        "return_tokens": True, "cache_prompt": False,
    }  # fmt: skip
    found = Answer(
        tokens=_post(url, "tokenize", split)["tokens"],
        log_probabilities=_distributions(url, request),
        written=_post(url, "completion", continued)["tokens"],
    )
    Path(path).write_text(json.dumps(asdict(found)))
    os._exit(0)  # its threads need not be asked to end


def _parameters(xllamacpp: Any, request: dict[str, Any]) -> Any:
    room = max(len(request["ids"]), len(request["prompt"]) + request["length"]) + 1
    found = xllamacpp.CommonParams()
    found.model.path = request["model"]
    found.n_ctx, found.n_parallel = max(512, room), 1
    found.warmup = found.fit_params = False
    found.cache_type_k = found.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    found.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    threads = min(2, os.cpu_count() or 1)  # the model is small: more would only wait
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = threads
    if request["adapter"]:
        found.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"], 1.0)]
    return found


def _distributions(url: str, request: dict[str, Any]) -> list[list[float]]:
    rows = []
    for end in range(1, len(request["ids"]) + 1):
        # Each prefix is the last one and a token more, of which the server remembers the former.
        # The bias chooses what is written; the probabilities are those before it.
        body = {
            "prompt": request["ids"][:end], "n_predict": 1, "temperature": 0,
            "n_probs": request["vocabulary"], "cache_prompt": True,
            "logit_bias": [[request["ordinary"], 1e6]],
        }  # fmt: skip
        row = [float("nan")] * request["vocabulary"]
        (told,) = _post(url, "completion", body)["completion_probabilities"]
        for entry in told["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    return rows


def _post(url: str, route: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/{route}", data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never a proxy
    with opener.open(request, timeout=_TIMEOUT) as reply:
        return json.load(reply)
