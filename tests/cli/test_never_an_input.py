"""No verb writes over what it reads: by path, by symbolic link, by hard link, with --force."""

import json
import os
import shutil
from pathlib import Path

import pytest

from loraformat.cli import _VERBS, commands
from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.ops.convert.convert import convert
from loraformat.ops.merge.merge import merge

#: Command lines by the option that names an output; OUT stands for it.
OUTPUTS = {
    ("check", "output"): ["check ADAPTER --fix --base BASE -o OUT"],
    ("check", "write"): ["check ADAPTER --base BASE --write OUT"],
    ("combine", "output"): ["combine ADAPTER OTHER --base BASE -o OUT"],
    ("convert", "target"): ["convert BASE OUT", "convert ADAPTER OUT --base BASE --canonical"],
    ("extract", "output"): ["extract BASE TUNED --rank 2 -o OUT"],
    ("info", "picture"): ["info BUNDLE --plot OUT.png"],
    ("merge", "output"): ["merge BASE ADAPTER -o OUT"],
    ("merge", "undo"): ["merge BASE ADAPTER -o new --undo OUT"],
    ("reduce", "output"): ["reduce ADAPTER --base BASE --rank 2 -o OUT"],
    ("spectrum", "picture"): ["spectrum ADAPTER --plot OUT.png"],
    ("train", "output"): ["train BUNDLE DATA --config CONFIG --chat-template TEMPLATE -o OUT"],
    ("unmerge", "output"): [
        "unmerge TUNED --undo RECORD --adapter ADAPTER -o OUT",
        "unmerge TUNED --adapter ADAPTER -o OUT",
    ],
}
#: Outputs of verbs that read nothing local.
WITHOUT_INPUT = {("demo", "directory"), ("pull", "target")}
INPUTS = {
    "path", "repo", "source", "sources", "base", "data", "adapter", "adapters", "merged", "tuned",
    "config", "chat_template", "original", "eval",
}  # fmt: skip
#: Options whose value is a text, but no path.
WORDS = {
    "from_", "to", "pre", "skip", "include", "exclude", "name", "runtime",
    "subset", "split", "device", "prompt", "system", "targets", "base_model", "license",
    "revision", "tag", "message",
}  # fmt: skip
#: Types of parameters whose value is no path.
NO_PATHS = {
    "BoolParamType", "Choice", "FloatParamType", "FloatRange", "FuncParamType", "IntParamType",
    "IntRange", "WeightType",
}  # fmt: skip
NAMES = ("BASE", "BUNDLE", "ADAPTER", "OTHER", "TUNED", "RECORD", "DATA", "CONFIG", "TEMPLATE")


def test_every_option_that_names_an_output_is_in_the_list():
    found = set()
    for verb in _VERBS:
        for parameter in commands.get_command(None, verb).params:
            if type(parameter.type).__name__ in NO_PATHS or parameter.name in INPUTS | WORDS:
                continue
            if (verb, parameter.name) == ("unmerge", "undo"):
                continue  # which reads it
            found.add((verb, parameter.name))
    assert found == OUTPUTS.keys() | WITHOUT_INPUT


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of each input, in one directory."""
    top = tmp_path_factory.mktemp("made")
    shutil.copytree(SMALL_MODEL, top / "BASE")
    shutil.copytree(ADAPTERS["manual"], top / "ADAPTER")
    shutil.copytree(ADAPTERS["tests"], top / "OTHER")
    convert(top / "BASE", top / "BUNDLE")
    merge(top / "BASE", [top / "ADAPTER"], top / "TUNED", undo=top / "RECORD")
    (top / "DATA").write_text(json.dumps({"text": "a"}) + "\n")
    (top / "CONFIG").write_text("rank: 2\n")
    (top / "TEMPLATE").write_text("{{ messages }}")
    return top


@pytest.fixture
def inputs(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def named_by(line):
    """Paths that a command line reads: directories and each file in them."""
    for name in set(line.replace(".png", "").split()) & set(NAMES):
        yield Path(name)
        if Path(name).is_dir():
            yield from (path for path in sorted(Path(name).rglob("*")) if path.is_file())


def call(run, line, output):
    words = [output if word == "OUT" else word for word in line.split()]
    verb = words[0]
    flags = {flag for p in commands.get_command(None, verb).params for flag in p.opts}
    return run(*words, *(["--force"] if "--force" in flags else []))


LINES = [line for lines in OUTPUTS.values() for line in lines]


@pytest.mark.parametrize("line", LINES)
def test_an_input_is_never_the_output(inputs, run, snapshot, line):
    before = snapshot(inputs)
    targets = list(named_by(line))
    assert targets
    for target in targets:
        if "OUT.png" in line:
            continue
        result = call(run, line, target)
        assert result.code in (2, 3, 5), (target, result.err)
        assert snapshot(inputs) == before, target


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("line", LINES)
def test_a_link_to_an_input_does_not_lead_to_it(inputs, run, snapshot, line, link):
    before = snapshot(inputs)
    for number, target in enumerate(named_by(line)):
        if target.is_dir() and link is os.link:
            continue
        suffix = ".png" if "OUT.png" in line else target.suffix
        name = inputs / f"link-{number}{suffix}"
        link(target.absolute(), name)
        result = call(run, line.replace("OUT.png", "OUT"), name)
        assert result.code in (0, 2, 3, 5), (target, result.err)
        after = snapshot(inputs)
        assert {path: after.get(path) for path in before} == before, target
        if name.is_dir() and not name.is_symlink():
            shutil.rmtree(name)
        else:
            name.unlink(missing_ok=True)
        for path in [*inputs.glob("new"), *inputs.glob("link-*")]:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def test_an_undo_record_lies_neither_in_the_output_nor_in_an_input(inputs, run, snapshot):
    merge("BASE", ["ADAPTER"], "old")
    before = snapshot(inputs)
    for record in ("old/r.lfu", "old", "BASE/r.lfu", "ADAPTER/r.lfu", "nowhere/r.lfu"):
        result = run("merge", "BASE", "ADAPTER", "-o", "old", "--undo", record, "--force")
        assert result.code == 5, record
    (inputs / "notes.txt").write_text("mine")
    result = run("merge", "BASE", "ADAPTER", "-o", "old", "--undo", "notes.txt", "--force")
    assert result.code == 5
    assert "is not an undo record" in result.err
    (inputs / "notes.txt").unlink()
    assert snapshot(inputs) == before


def test_a_picture_takes_the_place_of_a_picture_alone(inputs, run):
    (inputs / "notes.png").write_text("mine")
    assert run("spectrum", "ADAPTER", "--plot", "notes.png").code == 5
    assert (inputs / "notes.png").read_text() == "mine"
    for suffix in ("png", "svg", "pdf"):
        picture = inputs / f"picture.{suffix}"
        assert run("spectrum", "ADAPTER", "--plot", picture).code == 0
        first = picture.read_bytes()
        assert run("spectrum", "OTHER", "--plot", picture).code == 0
        assert picture.read_bytes() != first
    assert run("spectrum", "ADAPTER", "--plot", "nowhere/x.png").code == 5
