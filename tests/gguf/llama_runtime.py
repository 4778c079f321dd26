"""llama.cpp for tests, through xllamacpp, in a process of its own: it may abort.

A call starts a process that loads a base and its adapters, asks, and ends. What it says on
stderr is kept, as the only place where llama.cpp gives its reasons::

    values = log_probabilities("base.gguf", [[1, 5, 9]], [("lora.gguf", 1.0)])
    tokenize("base.gguf", ["some text"])
    with pytest.raises(RuntimeFailure, match="does not exist in base model"): ...

Everything is computed with float32 caches, without flash attention, on one thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["RuntimeFailure", "apply_template", "embeddings", "log_probabilities", "tokenize"]

_TIMEOUT = 120
Adapters = Sequence[tuple[str | Path, float]]


class RuntimeFailure(Exception):
    """The runtime refused, or died; the message ends with its log.

    Attributes
    ----------
    returncode : int
        Of the process; negative: the signal that ended it (-6 is an abort).
    log : str
        All that it wrote to stderr.
    """

    def __init__(self, returncode: int, log: str) -> None:
        self.returncode, self.log = returncode, log
        super().__init__(f"exit {returncode}:\n{log[-8000:]}")


def log_probabilities(
    base: str | Path,
    prompts: Sequence[Sequence[int]],
    adapters: Adapters = (),
    *,
    scales: Sequence[float] | None = None,
    options: dict[str, Any] | None = None,
) -> np.ndarray:
    """Ask for the distribution of the token after each prompt.

    Parameters
    ----------
    base : path
    prompts : sequence of sequence of int
        Token ids; none is added.
    adapters : sequence of (path, scale)
        LoRA files and the scales with which they are loaded.
    scales : sequence of float, optional
        One for each adapter, sent with each request instead.
    options : dict, optional
        Attributes of ``xllamacpp.CommonParams`` to set.

    Returns
    -------
    numpy.ndarray
        float64, ``[prompts, vocabulary]``: natural logarithms, before any sampling.

    Raises
    ------
    RuntimeFailure
    """
    request = {"ask": "logprobs", "prompts": [list(map(int, ids)) for ids in prompts]}
    request |= {"scales": None if scales is None else list(map(float, scales))}
    return np.asarray(_run(base, adapters, request, options), dtype=np.float64)


def tokenize(
    base: str | Path,
    texts: Sequence[str],
    *,
    add_special: bool = False,
    parse_special: bool = True,
    options: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Return the token ids of each text."""
    request = {"ask": "tokenize", "texts": list(texts), "add_special": add_special,
               "parse_special": parse_special}  # fmt: skip
    return _run(base, (), request, options)


def apply_template(base: str | Path, chats: Sequence[Sequence[dict[str, str]]]) -> list[str]:
    """Return the prompt that llama.cpp's server makes of each conversation."""
    return _run(base, (), {"ask": "template", "chats": [list(chat) for chat in chats]}, None)


def complete(base: str | Path, prompt: Sequence[int], count: int) -> tuple[list[int], str]:
    """Return the likeliest tokens after a prompt, and why they end: ``eos`` or ``limit``."""
    request = {"ask": "complete", "prompt": list(map(int, prompt)), "count": count}
    tokens, why = _run(base, (), request, None)
    return tokens, why


def embeddings(
    base: str | Path,
    prompts: Sequence[Sequence[int]],
    adapters: Adapters = (),
    *,
    pooling: str = "NONE",
    options: dict[str, Any] | None = None,
) -> list[np.ndarray]:
    """Return the hidden states after the last layer and norm, not normalised.

    Parameters
    ----------
    pooling : {"NONE", "MEAN", "CLS", "LAST"}

    Returns
    -------
    list of numpy.ndarray
        float64, ``[tokens, width]`` for each prompt; one row with pooling.
    """
    request = {"ask": "embeddings", "prompts": [list(map(int, ids)) for ids in prompts]}
    request |= {"pooling": pooling}
    return [np.asarray(rows, dtype=np.float64) for rows in _run(base, adapters, request, options)]


def _run(
    base: str | Path, adapters: Adapters, request: dict[str, Any], options: dict[str, Any] | None
) -> Any:
    request |= {
        "base": str(base),
        "adapters": [(str(path), float(scale)) for path, scale in adapters],
        "options": options or {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        done = subprocess.run(
            [sys.executable, __file__, str(answer)],
            input=json.dumps(request),
            stdout=subprocess.DEVNULL,  # llama.cpp talks there, too
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode or not answer.exists():
            raise RuntimeFailure(done.returncode, done.stderr)
        return json.loads(answer.read_text())


# --- In the process ---------------------------------------------------------------------------


def _serve(answer: Path) -> None:
    import xllamacpp as x

    request = json.loads(sys.stdin.read())
    params = x.CommonParams()
    params.model.path = request["base"]
    params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = 512, 1, 512, 512
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.lora_adapters = [
        x.CommonAdapterLoraInfo(path, scale) for path, scale in request["adapters"]
    ]
    if request["ask"] == "embeddings":
        params.embedding = True
        params.pooling_type = getattr(
            x.llama_pooling_type, f"LLAMA_POOLING_TYPE_{request['pooling']}"
        )
    for name, value in request["options"].items():
        setattr(params, name, value)
    server = x.Server(params)
    ask = {
        "logprobs": _ask_logprobs, "tokenize": _ask_tokens, "embeddings": _ask_embeddings,
        "template": _ask_template, "complete": _ask_completion,
    }  # fmt: skip
    answer.write_text(json.dumps(ask[request["ask"]](server.listening_address, request)))
    os._exit(0)  # its threads need not be asked to end


def _ask_logprobs(url: str, request: dict[str, Any]) -> list[list[float]]:
    vocabulary, safe = _vocabulary(request["base"])
    found = []
    for ids in request["prompts"]:
        body = {
            "prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": vocabulary,
            "cache_prompt": False,
            # A token that ends the text, or half a character, would be answered without
            # probabilities. The values given are those before this bias.
            "logit_bias": [[safe, 1e6]],
        }  # fmt: skip
        if request["scales"] is not None:
            body["lora"] = [{"id": n, "scale": s} for n, s in enumerate(request["scales"])]
        reply = _post(url, "completion", body)
        row = [float("nan")] * vocabulary
        for entry in reply["completion_probabilities"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        found.append(row)
    return found


def _ask_completion(url: str, request: dict[str, Any]) -> tuple[list[int], str]:
    body = {"prompt": request["prompt"], "n_predict": request["count"], "temperature": 0,
            "return_tokens": True}  # fmt: skip
    reply = _post(url, "completion", body)
    return reply["tokens"], reply["stop_type"]


def _vocabulary(base: str) -> tuple[int, int]:
    """Return the number of tokens, and one that is an ordinary letter or word."""
    from loraformat_converters.gguf.container.reader import open_gguf

    with open_gguf(Path(base)) as file:
        tokens = file.array("tokenizer.ggml.tokens")
        kinds = [1] * len(tokens)
        if "tokenizer.ggml.token_type" in file.metadata:
            kinds = file.array("tokenizer.ggml.token_type")
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == 1 and token.isascii() and token.isalnum():
            return len(tokens), number
    raise SystemExit("the vocabulary has no ordinary token")


def _ask_tokens(url: str, request: dict[str, Any]) -> list[list[int]]:
    flags = {key: request[key] for key in ("add_special", "parse_special")}
    return [
        _post(url, "tokenize", {"content": text, **flags})["tokens"] for text in request["texts"]
    ]


def _ask_template(url: str, request: dict[str, Any]) -> list[str]:
    return [_post(url, "apply-template", {"messages": chat})["prompt"] for chat in request["chats"]]


def _ask_embeddings(url: str, request: dict[str, Any]) -> list[list[list[float]]]:
    found = []
    for ids in request["prompts"]:
        reply = _post(url, "embeddings", {"content": ids, "embd_normalize": -1})
        found.append(reply[0]["embedding"])
    return found


def _post(url: str, route: str, body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/{route}", data, {"Content-Type": "application/json"})
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never a proxy
        with opener.open(request, timeout=_TIMEOUT) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{route}: {error}: {error.read().decode(errors='replace')}") from None


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
