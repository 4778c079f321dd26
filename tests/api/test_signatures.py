"""Each public function takes what its command takes: the same names, the same defaults."""

import inspect
from pathlib import Path

import click
import pytest

import loraformat
from loraformat.cli import commands
from loraformat.demo.pipeline import demo
from loraformat.ops.arguments import byte_count
from loraformat.train.run.options import SETTINGS
from loraformat.train.run.verbs import train

FUNCTIONS = {
    name: getattr(loraformat, name)
    for name in (
        "check", "combine", "convert", "extract", "formats", "generate", "info", "merge", "pull",
        "push", "reduce", "remove", "spectrum", "unmerge", "verify",
    )
} | {"eval": loraformat.evaluate, "train": train, "demo": demo}  # fmt: skip
#: Keywords that Python has alone: how progress is shown, and former names.
PYTHON_ONLY = {"progress", "from_format", "to_format"}
#: What the command line has alone: how it prints, and what has a function of its own in Python.
PRINTED = {"as_json", "quiet"}
CLI_ONLY = {
    "check": {"fixing", "output", "dtype", "experts", "force"},  # loraformat.fix
    "info": {"tensors", "picture"},  # the report's, and loraformat.plot_errors
    "merge": {"show_modules"},  # the report's
    "spectrum": {"picture"},  # loraformat.plot_spectrum
    "train": {"config"},  # Python has mappings
}
#: Options that a call cannot do without are arguments in Python.
REQUIRED = {"output": None, "prompt": "generate"}
SETTINGS_BY_NAME = {setting.name: setting for setting in SETTINGS}


def options_of(verb):
    command = commands.get_command(None, verb)
    hidden = PRINTED | CLI_ONLY.get(verb, set())
    return {p.name: p for p in command.params if p.name not in hidden}


def plain(name, value):
    """Return a default in one form; nothing is None, whether it is empty or not set."""
    if name == "max_shard_size":
        return value and byte_count(value, name)
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return value if isinstance(value, bool | int | float) or value else None


def defaults_of(verb):
    """Return what holds if no option is given, as click or the trainer's table has it."""
    command = commands.get_command(None, verb)
    words = []
    for parameter in command.params:
        if parameter.required:
            words += [parameter.opts[-1]] if isinstance(parameter, click.Option) else []
            words.append("x")
    parsed = command.make_context(verb, words).params
    own = {"generate": ("adapter", "seed"), "eval": ("adapter",)}.get(verb, ())
    tabled = {} if verb not in ("train", "eval", "generate") else SETTINGS_BY_NAME
    return {
        name: tabled[name].default if name in tabled and name not in own else value
        for name, value in parsed.items()
    }


@pytest.mark.parametrize("verb", sorted(FUNCTIONS))
def test_the_function_has_the_commands_options(verb):
    options = options_of(verb)
    signature = inspect.signature(FUNCTIONS[verb]).parameters
    keywords = {
        n: p for n, p in signature.items() if p.kind is p.KEYWORD_ONLY and n not in PYTHON_ONLY
    }
    positional = [n for n, p in signature.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = [p.name for p in options.values() if isinstance(p, click.Argument)]
    needed = [n for n in options if n in REQUIRED and REQUIRED[n] in (None, verb)]
    assert positional == [*arguments, *needed]
    assert set(keywords) == set(options) - set(positional)
    defaults = defaults_of(verb)
    for name, keyword in keywords.items():
        assert plain(name, keyword.default) == plain(name, defaults[name]), name


def test_fix_has_what_check_has_for_it():
    options = {p.name for p in commands.get_command(None, "check").params}
    names = set(inspect.signature(loraformat.fix).parameters)
    assert names == (options - PRINTED - {"fixing", "runtime", "write"}) | {"dry_run"}


def test_every_option_of_every_function_is_described():
    for function in (*FUNCTIONS.values(), loraformat.fix):
        said = inspect.getdoc(function)
        for name in inspect.signature(function).parameters:
            assert any(name in line for line in said.splitlines()), (function.__name__, name)


def test_every_verb_has_a_function():
    assert set(FUNCTIONS) == set(commands.list_commands(None))


def test_nothing_public_shadows_a_builtin():
    import builtins

    assert not set(loraformat.__all__) & set(dir(builtins))


def test_the_same_names_are_public_to_type_checkers():
    text = Path(loraformat.__file__).read_text()
    for name in set(loraformat.__all__) - {"__version__"}:
        assert f" import {name} as {name}" in text
        assert getattr(loraformat, name).__name__.rpartition(".")[2] == name
    assert set(loraformat.__all__) <= set(dir(loraformat))
