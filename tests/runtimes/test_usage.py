"""The lines that tell a runtime to load an adapter: they parse, and no name breaks out of them."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys

import pytest

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.errors import UsageError
from loraformat.runtimes.chat import Chat, ChatFormat
from loraformat.runtimes.usage import SNIPPETS
from loraformat.runtimes.use import Use

PLAIN = Use("polite", "org/base", "out/polite", 8)
NASTY = Use("a b'; rm -rf $HOME #", "-base dir", 'x"$(touch y)`z`', 8, "-l.gguf", "m 'q'.gguf")


def shell_words(text):
    return shlex.split(text.replace("\\\n", " "), comments=True)


@pytest.mark.parametrize("runtime", [name for name in SNIPPETS if name != "transformers"])
def test_names_stay_what_they_are_in_a_shell(runtime):
    text = SNIPPETS[runtime](NASTY).text
    if runtime == "ollama":
        assert "\nFROM ./a b'; rm -rf $HOME #-merged.gguf\n" in text
        assert "\n# FROM ./m 'q'.gguf\n# ADAPTER ./-l.gguf\n" in text
        assert all(line[:1] in ("#", "") or line.startswith("FROM") for line in text.split("\n"))
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
    words = shell_words(SNIPPETS["vllm"](dataclasses.replace(PLAIN, rank=rank)).text)
    assert words[words.index("--max-lora-rank") + 1] == str(limit)


COMMIT = "0123456789" * 4


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "lorax", "mlx", "transformers"])
def test_a_known_commit_of_the_base_is_what_is_loaded(runtime):
    text = SNIPPETS[runtime](dataclasses.replace(PLAIN, revision=COMMIT)).text
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
    assert COMMIT not in SNIPPETS[runtime](PLAIN).text
    assert "revision" not in SNIPPETS[runtime](PLAIN).text


def test_vllm_serves_no_larger_rank():
    with pytest.raises(UsageError, match="reduce"):
        SNIPPETS["vllm"](dataclasses.replace(PLAIN, rank=513))


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "lorax"])
def test_requests_are_json_that_names_the_adapter(runtime):
    words = shell_words(SNIPPETS[runtime](NASTY).text)
    body = json.loads(words[words.index("-d") + 1])
    named = body.get("model") or body.get("lora_path") or body["parameters"]["adapter_id"]
    assert named == (NASTY.adapter if runtime == "lorax" else NASTY.name)


def test_lorax_says_where_the_adapter_is():
    for source, on_hub in (("local", False), ("hub", True)):
        use = dataclasses.replace(PLAIN, on_hub=on_hub)
        request = json.loads(shell_words(SNIPPETS["lorax"](use).text)[-1])
        assert request["parameters"]["adapter_source"] == source


CHAT = Chat(
    ChatFormat("", None, "<|u|>", "<|a|>", "<|e|>"),
    ("<|e|>",),
    (7,),
    "out/polite/chat_template.jinja",
)
TALKS = dataclasses.replace(PLAIN, chat=CHAT, prompt="What can you do?")


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "lorax", "llama.cpp"])
def test_an_adapter_of_conversations_is_talked_to(runtime):
    text = SNIPPETS[runtime](TALKS).text
    assert "Once upon a time" not in text and "/v1/chat/completions" in text
    words = shell_words(text)
    body = json.loads(words[words.index("-d") + 1])
    assert body["messages"] == [{"role": "user", "content": "What can you do?"}]
    if runtime == "llama.cpp":
        assert words.count("-cnv") == 1
        option = words[words.index("--chat-template-file") + 1]
        assert words.count("--jinja") == 3
    else:
        assert body["stop_token_ids"] == [7]
        named = {"vllm": "polite", "sglang": "org/base:polite", "lorax": "out/polite"}
        assert body["model"] == named[runtime]
    if runtime == "lorax":
        assert words[words.index("--adapter-source") + 1] == "local"
    elif runtime != "llama.cpp":
        option = words[words.index("--chat-template") + 1]
    if runtime != "lorax":
        assert option == "out/polite/chat_template.jinja"
        fetched = shell_words(SNIPPETS[runtime](dataclasses.replace(TALKS, on_hub=True)).text)
        assert fetched[:4] == ["hf", "download", "out/polite", "chat_template.jinja"]


ENDS = dataclasses.replace(
    TALKS, chat=Chat(ChatFormat("", None, "Q: ", "A: ", "</turn>\n"), ("<|eos|>",))
)


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "lorax", "llama.cpp"])
def test_a_turn_that_no_token_ends_is_ended_by_its_text(runtime):
    words = shell_words(SNIPPETS[runtime](ENDS).text)
    assert json.loads(words[words.index("-d") + 1])["stop"] == ["</turn>"]
    words = shell_words(SNIPPETS[runtime](TALKS).text)
    assert "stop" not in json.loads(words[words.index("-d") + 1])


def test_in_a_modelfile_too():
    text = SNIPPETS["ollama"](ENDS).text
    assert 'PARAMETER stop "<|eos|>"\nPARAMETER stop "</turn>"\n' in text


def test_a_modelfile_of_conversations():
    text = SNIPPETS["ollama"](TALKS).text
    assert 'TEMPLATE """<|u|>{{ .Prompt }}<|a|>{{ .Response }}<|e|>"""\n' in text
    assert 'PARAMETER stop "<|e|>"\n' in text
    first = text.splitlines()[0]
    assert shell_words(first.removeprefix("# ")) == [
        "loraformat", "merge", "org/base", "out/polite", "-o", "polite-merged.gguf"
    ]  # fmt: skip
    assert "# Ollama before 0.34.1 also takes the adapter" in text


def test_the_transformers_snippet_of_a_conversation_runs(tmp_path):
    adapter = shutil.copytree(ADAPTERS["manual"], tmp_path / "adapter")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    (adapter / "chat_template.jinja").write_text(template)
    pieces = ChatFormat("", None, "user: ", "", "</turn>")
    chat = Chat(pieces, ("<|pad|>",), (0, 1), str(adapter / "chat_template.jinja"))
    use = Use("manual", str(SMALL_MODEL), str(adapter), 8, chat=chat)
    script = tmp_path / SNIPPETS["transformers"](use).file
    script.write_text(SNIPPETS["transformers"](use).text)
    assert "eos_token_id=[0, 1]" in script.read_text()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "What can you do?" not in done.stdout


def test_the_transformers_snippet_runs(tmp_path):
    use = Use("manual", str(SMALL_MODEL), str(ADAPTERS["manual"]), 8)
    script = tmp_path / SNIPPETS["transformers"](use).file
    script.write_text(SNIPPETS["transformers"](use).text)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
