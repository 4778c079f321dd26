"""The lines that tell a runtime to load an adapter: they parse, and no name breaks out of them."""

import dataclasses
import json
import shlex
import subprocess
import sys

import pytest

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.errors import UsageError
from loraformat.runtimes.usage import SNIPPETS, Use, lorax, snippet, vllm

PLAIN = Use("polite", "org/base", "out/polite", 8)
NASTY = Use("a b'; rm -rf $HOME #", "-base dir", 'x"$(touch y)`z`', 8, "-l.gguf", "m 'q'.gguf")


def shell_words(text):
    return shlex.split(text.replace("\\\n", " "), comments=True)


@pytest.mark.parametrize("runtime", [name for name in SNIPPETS if name != "transformers"])
def test_names_stay_what_they_are_in_a_shell(runtime):
    text = snippet(runtime, NASTY).text
    if runtime == "ollama":
        assert "FROM ./m 'q'.gguf\nADAPTER ./-l.gguf\n" in text
        return
    words = shell_words(text)
    assert not {"rm", "touch", "$HOME"} & set(words)
    assert not any(word.startswith(("-base", "-l.gguf")) for word in words)
    joined = "\0".join(words)
    for name in ("./-base dir", 'x"$(touch y)`z`'):
        if runtime != "llama.cpp":
            assert name in joined or json.dumps(name)[1:-1] in joined


@pytest.mark.parametrize("field", ["name", "base", "adapter", "gguf", "base_gguf"])
def test_a_line_break_is_refused(field):
    with pytest.raises(UsageError, match="control"):
        dataclasses.replace(PLAIN, **{field: "a\nFROM evil"})
    with pytest.raises(UsageError):
        dataclasses.replace(PLAIN, **{field: ""})


@pytest.mark.parametrize(
    ("rank", "limit"), [(1, 1), (4, 8), (16, 16), (17, 32), (200, 256), (300, 320), (512, 512)]
)
def test_vllm_gets_a_limit_that_it_accepts(rank, limit):
    words = shell_words(vllm(dataclasses.replace(PLAIN, rank=rank)).text)
    assert words[words.index("--max-lora-rank") + 1] == str(limit)


COMMIT = "0123456789" * 4


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "lorax", "mlx", "transformers"])
def test_a_known_commit_of_the_base_is_what_is_loaded(runtime):
    text = snippet(runtime, dataclasses.replace(PLAIN, revision=COMMIT)).text
    if runtime == "transformers":
        compile(text, "script", "exec")
        assert f'base = "org/base"\nrevision = "{COMMIT}"\n' in text
        assert text.count("(base, revision=revision") == 2
    elif runtime == "mlx":
        assert shell_words(text)[2] == f"org/base@{COMMIT}"
    else:
        words = shell_words(text)
        assert words[words.index("--revision") + 1] == COMMIT
        assert words[words.index("org/base") + 1] == "--revision"
    assert COMMIT not in snippet(runtime, PLAIN).text
    assert "revision" not in snippet(runtime, PLAIN).text


def test_vllm_serves_no_larger_rank():
    with pytest.raises(UsageError, match="reduce"):
        vllm(dataclasses.replace(PLAIN, rank=513))


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "lorax"])
def test_requests_are_json_that_names_the_adapter(runtime):
    words = shell_words(snippet(runtime, NASTY).text)
    body = json.loads(words[words.index("-d") + 1])
    named = body.get("model") or body.get("lora_path") or body["parameters"]["adapter_id"]
    assert named == (NASTY.adapter if runtime == "lorax" else NASTY.name)


def test_lorax_says_where_the_adapter_is():
    sources = {local: shell_words(lorax(PLAIN, local=local).text)[-1] for local in (True, False)}
    assert json.loads(sources[True])["parameters"]["adapter_source"] == "local"
    assert json.loads(sources[False])["parameters"]["adapter_source"] == "hub"


def test_the_transformers_snippet_runs(tmp_path):
    use = Use("manual", str(SMALL_MODEL), str(ADAPTERS["manual"]), 8)
    script = tmp_path / snippet("transformers", use).file
    script.write_text(snippet("transformers", use).text)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
