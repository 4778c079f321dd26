"""The commands of docs/hub.md and of the README, run in their order."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.ops.convert.convert import convert
from tests.conftest import environment
from tests.hub.conftest import BASE_COMMIT, TOKEN, Repository, files_of

ROOT = Path(__file__).parents[2]


def commands(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)).splitlines()
    return [line.split("   #")[0] for line in lines if line.startswith("loraformat ")]


def test_commands_run_in_order(ask, shelf, tmp_path):
    shutil.copytree(ADAPTERS["manual"], tmp_path / "my-adapter")
    convert(SMALL_MODEL, tmp_path / "my-bundle")
    convert(ADAPTERS["tests"], tmp_path / "my-bundle" / "adapters" / "medical")
    lines = commands("docs/hub.md")
    assert len(lines) == 7
    lines += [line for line in commands("README.md") if line.split()[1] in ("push", "pull")]
    assert len(lines) == 9
    shutil.copytree(ADAPTERS["manual"], tmp_path / "A")
    for line in lines:
        result = ask(*shlex.split(line)[1:], HF_TOKEN=TOKEN)
        assert (result.returncode, result.stderr) == (0, ""), line
    assert (tmp_path / "just-gguf" / "my-adapter-lora-f16.gguf").exists()
    assert shelf.repositories["me/medical"].private


def test_what_a_card_says_can_be_copied_and_run(ask, shelf, tmp_path):
    """The Python block, with PEFT and transformers, and the commands of loraformat."""
    shelf.repositories["org/base"] = Repository(files_of(SMALL_MODEL), BASE_COMMIT)
    assert ask("push", "adapter", "me/polite", HF_TOKEN=TOKEN).returncode == 0
    card = shelf.repositories["me/polite"].files["README.md"].decode()
    (python,) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    (tmp_path / "run.py").write_text(python)
    result = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env={**environment(tmp_path), "HF_ENDPOINT": shelf.endpoint},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Once upon a time")
    lines = re.findall(r"^loraformat .*$", card, re.M)
    assert len(lines) == 2
    for line in lines:
        result = ask(*shlex.split(line)[1:])
        assert (result.returncode, result.stderr) == (0, ""), line
    (served,) = re.findall(r"^llama-server -m (\S+) --lora (\S+)$", card, re.M)
    assert all((tmp_path / name).is_file() for name in served)
