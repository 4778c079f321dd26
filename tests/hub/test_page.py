"""The commands of docs/hub.md and of the README, run in their order."""

import re
import shlex
import shutil
from pathlib import Path

from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.ops.convert import convert
from tests.hub.conftest import TOKEN

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
