"""The example of ``converters/README.md``: the text is the code, and the code works installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraformat import plugins
from loraformat.testing import checkpoint, dense, save

ROOT = Path(__file__).parents[2]
README = ROOT / "converters" / "README.md"
EXAMPLE = ROOT / "converters" / "examples" / "loraformat-npz"
BLOCK = re.compile(
    r"^`(?P<file>[\w./]+)`:\n\n```\w+\n(?P<code>.*?)\n```$", re.MULTILINE | re.DOTALL
)


def run(*command, site, cwd):
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory with the example installed, as pip installs it."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "loraformat-npz"
    for file in blocks():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((EXAMPLE / file).read_bytes())
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run("-m", "pip", "install", *options, "--target", target, source, site="", cwd=target)
    return target


def blocks():
    found = {}
    for match in BLOCK.finditer(README.read_text(encoding="utf-8")):
        found.setdefault(match["file"], []).append(match["code"])
    return found


def test_readme_has_ten_steps():
    steps = re.findall(r"^## (\d+)\. ", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert steps == [str(number) for number in range(1, 11)]


def test_readme_shows_every_file():
    paths = [p.relative_to(EXAMPLE) for p in EXAMPLE.rglob("*") if p.is_file()]
    made = ("__pycache__", ".", "build", "dist")
    files = {p.as_posix() for p in paths if not any(part.startswith(made) for part in p.parts)}
    assert blocks().keys() == files


@pytest.mark.parametrize("file", ["pyproject.toml", "loraformat_npz.py", "tests/test_npz.py"])
def test_readme_shows_the_code_as_it_is(file):
    """All blocks of a file, one after the other, are the file."""
    code = "\n\n\n".join(blocks()[file]) + "\n"
    assert code == (EXAMPLE / file).read_text(encoding="utf-8")


def test_it_is_not_installed_here():
    """Else the tests below would prove nothing about finding it."""
    assert "npz" not in [converter.name for converter in plugins.all_converters()]


def test_formats_lists_it(site, tmp_path):
    text = run("-m", "loraformat", "formats", site=site, cwd=tmp_path)
    assert "npz (base; reads and writes)\n    NumPy: an uncompressed .npz archive" in text
    listed = json.loads(run("-m", "loraformat", "formats", "--json", site=site, cwd=tmp_path))
    assert {"npz", "safetensors", "bitsandbytes"} <= {f["name"] for f in listed["formats"]}


def test_it_converts(site, tmp_path):
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = ("model.layers.0.mlp.up_proj.weight", "lm_head.weight")
    model = checkpoint(*(dense(n, weights) for n in names), config={"model_type": "llama"})
    save(plugins.get("safetensors"), model, tmp_path / "src")

    def convert(*arguments):
        run("-m", "loraformat", "convert", "--quiet", *arguments, site=site, cwd=tmp_path)

    convert("src", "npz", "--to", "npz")
    convert("npz", "bundle")
    convert("npz", "back", "--to", "safetensors")
    assert (tmp_path / "npz" / "model.npz").is_file()
    assert (tmp_path / "bundle" / "loraformat.json").is_file()
    wanted = (tmp_path / "src" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == wanted


def test_it_passes_the_kit(site, tmp_path):
    tests = EXAMPLE / "tests" / "test_npz.py"
    (tmp_path / tests.name).write_bytes(tests.read_bytes())
    text = run("-m", "pytest", "-q", "-p", "no:cacheprovider", tests.name, site=site, cwd=tmp_path)
    assert re.search(r"^[4-9]\d passed in", text, re.MULTILINE), text
