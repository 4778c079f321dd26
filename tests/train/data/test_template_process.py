"""Chat templates are rendered as transformers renders them, and end when they would not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from loraformat.chat_templates import process as template_process
from loraformat.chat_templates import worker as template_worker
from loraformat.chat_templates.process import TemplateProcess, TemplateRefusalError
from loraformat.errors import InputError, LoraFormatError
from loraformat.train.data import DataOptions, open_data
from loraformat.train.data.tokenizer import TextEncoder
from tests.train.data.tokenizers_and_templates import TEMPLATES

ASKED = [{"role": "user", "content": "two plus two?"}]
SAID = [*ASKED, {"role": "assistant", "content": 'vier → 4 😀 "\ud800" \x1b'}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"

FOREVER = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
    # One instruction of Python each, in which nothing of Python can stop it.
    "a power": "{{ messages | length * 9 ** (9 ** 9) }}",
    "a power of constants": "{{ 9 ** (9 ** 9) }}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def hurried():
    """A process that gives a conversation half a second and 64 MiB."""
    process = TemplateProcess(0.5, 64 << 20)
    yield process
    process.close()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_it_writes_what_transformers_writes(tokenizer, name, prompt):
    tokenizer.chat_template = TEMPLATES[name]
    messages = [SAID[0] | {"name": None}, SAID[1]]
    wanted = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt, tools=None
    )
    assert TextEncoder(tokenizer, "test").render(messages, None, prompt=prompt) == wanted


def test_tools_and_special_tokens_reach_the_template(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{{ tools | tojson }}{{ messages[0].time }}"
    tools = [{"type": "function", "function": {"name": "über", "parameters": {}}}]
    wanted = tokenizer.apply_chat_template(ASKED, tokenize=False, tools=tools)
    assert TextEncoder(tokenizer, "test").render(ASKED, tools, prompt=False) == wanted
    assert "<s>[{" in wanted and "über" in wanted
    messages = [ASKED[0] | {"time": object()}]  # of which a template must not get hold
    found = TextEncoder(tokenizer, "test").render(messages, tools, prompt=False)
    assert found == wanted + "<object>"


@pytest.mark.parametrize("name", FOREVER)
def test_a_template_that_computes_for_ever_is_ended(hurried, name):
    with pytest.raises(InputError, match=r"m: its chat template computes for more than 0\.5 sec"):
        hurried.render(FOREVER[name], ASKED, name="m")
    assert hurried.render(PLAIN, ASKED) == "user: two plus two?;"  # another one does


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize(
    "template",
    [
        "{{ ('a' * 100000000) | length }}",
        "{% set ns = namespace(a='a' * 1000) %}"
        "{% for i in range(30) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    ],
)
def test_a_template_that_takes_memory_is_refused_it(hurried, template):
    with pytest.raises(InputError, match="takes more than 64 MiB of memory") as error:
        hurried.render(template, ASKED, name="m")
    assert "--chat-template" in str(error.value)
    assert hurried.render(PLAIN, ASKED) == "user: two plus two?;"


def test_a_template_that_writes_too_much_is_refused():
    process = TemplateProcess()
    with pytest.raises(InputError, match="writes more than 32 million characters"):
        process.render("{{ 'a' * 33554433 }}", ASKED, name="m")
    assert len(process.render("{{ '\x01' * 3000000 }}", ASKED)) == 3000000
    process.close()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in %}", "Expected an expression"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_what_a_template_refuses_is_told(template, message):
    with pytest.raises(TemplateRefusalError, match=message):
        template_process.shared().render(template, ASKED)
    with pytest.raises(TemplateRefusalError, match="no message"):
        template_process.shared().render(PLAIN, [])


def test_such_a_template_ends_the_run_though_bad_rows_are_skipped(
    tokenizer, write, hurried, monkeypatch
):
    monkeypatch.setattr("loraformat.train.data.tokenizer.shared", lambda: hurried)
    tokenizer.chat_template = FOREVER["nested loops"]
    path = write("a.jsonl", [{"messages": [*ASKED, {"role": "assistant", "content": "four"}]}])
    with pytest.raises(InputError, match="computes for more than"):
        open_data(path, tokenizer, DataOptions(bad_rows="skip"))


def test_rows_without_conversations_need_no_process(tokenizer, write, monkeypatch):
    def shared():
        raise AssertionError

    monkeypatch.setattr("loraformat.train.data.tokenizer.shared", shared)
    tokenizer.chat_template = TEMPLATES["chatml"]
    rows = [{"prompt": "two plus two?", "completion": " It is four."}]
    assert open_data(write("a.jsonl", rows), tokenizer).audit.samples == 1


def test_an_interrupt_leaves_no_answer_behind():
    process = TemplateProcess()
    process.render(PLAIN, ASKED)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            process.render(FOREVER["nested loops"], ASKED)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert process.render(PLAIN, ASKED) == "user: two plus two?;"
    process.close()


def test_a_process_that_ends_is_told_and_replaced(monkeypatch):
    process = TemplateProcess()
    process.render(PLAIN, ASKED)
    os.kill(process._process.pid, signal.SIGSTOP)  # so that it dies with the request unanswered

    def receive(*arguments):
        os.kill(process._process.pid, signal.SIGKILL)
        return template_worker.receive(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(template_process, "receive", receive)
        with pytest.raises(LoraFormatError, match="ended with code -9"):
            process.render(PLAIN, ASKED)
    assert process.render(PLAIN, ASKED) == "user: two plus two?;"
    process.close()


def test_it_ends_with_its_parent_and_ctrl_c_is_not_for_it():
    code = (
        "import os\n"
        "from loraformat.chat_templates.process import shared\n"
        f"shared().render({PLAIN!r}, {ASKED!r})\n"
        "child = shared()._process.pid\n"
        "assert os.getsid(child) != os.getsid(0)\n"
        "print(child, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == -9, found.stderr
    for _ in range(200):
        try:
            os.kill(int(found.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("it is still there")
