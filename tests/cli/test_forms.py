"""One form for what the command line says: errors, sections of options, completion, version."""

import click
import pytest

from loraformat import __version__
from loraformat.cli import _VERBS, commands
from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.train.run.options import SETTINGS


def test_version_has_a_short_flag(run):
    assert run("-V").out == f"loraformat, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-verb"], "no such command 'no-such-verb'; see loraformat --help"),
        (["convert", "a"], "missing argument 'DST'; see loraformat convert --help"),
        (["convert", "a", "b", "--nothing"], "no such option '--nothing'; see loraformat convert "),
        (["verify", "a", "b"], "got unexpected extra argument (b); see loraformat verify --help"),
        (["convert", "a", "b", "--dtype", "f17"], "invalid value for '--dtype': 'f17' is not one"),
        (["convert", "nowhere", "b"], "nowhere: no such file or directory; Hub ids have the form"),
    ],
)
def test_errors_of_click_and_our_own_have_one_form(run, arguments, said):
    result = run(*arguments)
    assert result.err.startswith(f"error: {said}") and result.err.count("\n") == 1
    assert result.out == ""


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_options_stand_in_sections(run, verb):
    text = run(verb, "--help").out
    sections = text.split(" options:\n")
    heads = [section.rsplit("\n", 1)[-1] for section in sections[:-1]]
    wanted = ["Data", "Adapter", "Optimisation", "Memory", "Evaluation", "Output", "Other"]
    assert heads == (wanted if verb == "train" else ["Data", "Adapter", "Memory", "Other"])
    under = dict(zip(heads, sections[1:], strict=True))
    command = commands.get_command(None, verb)
    for setting in SETTINGS:
        if setting.section != "run" and setting.name in {p.name for p in command.params}:
            assert f"  --{setting.flag} " in under[setting.section]
    assert "--json" in under["Other"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [("con", "convert"), ("convert --max", "--max-shard-size"), ("convert my-", "file")],
)
def test_the_shell_completes_verbs_options_and_paths(run, monkeypatch, words, wanted):
    monkeypatch.setenv("_LORAFORMAT_COMPLETE", "zsh_complete")
    monkeypatch.setenv("COMP_WORDS", f"loraformat {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    result = run()
    assert (result.code, result.err) == (0, "")
    assert wanted in result.out.splitlines()


@pytest.mark.parametrize("verb", ["convert", "merge", "reduce"])
def test_a_suffix_that_nobody_writes_is_asked_about(run, tmp_path, verb):
    model, adapter = SMALL_MODEL, ADAPTERS["manual"]
    target = tmp_path / "out.ggf"
    arguments = {
        "convert": ["convert", model, target],
        "merge": ["merge", model, adapter, "-o", target],
        "reduce": ["reduce", adapter, "-o", target, "--rank", "1"],
    }[verb]
    result = run(*arguments)
    assert result.code == 2 and not target.exists()
    meant = tmp_path / "out.gguf"
    assert f"as .ggf file; did you mean {meant}? Else give a directory, or" in result.err
    more = ["--base", model] if verb == "reduce" else []
    result = run(*(meant if word == target else word for word in arguments), *more)
    assert result.code == 0 and meant.is_file()
    if verb == "convert":
        assert run(*arguments, "--to", "safetensors").code == 0 and target.is_dir()


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "model.v2", "model.d", "model.4bit"])
def test_names_of_directories_may_have_dots(run, model, tmp_path, name):
    assert run("convert", model, tmp_path / name, "--dry-run").code == 0


@pytest.mark.parametrize("verb", sorted(_VERBS))
def test_every_option_has_words_of_a_command_line(verb):
    """They are read from docstrings, in which options have the names of Python."""
    command = commands.get_command(None, verb)
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert command.help and all(option.help for option in options)
    names = {option.name for option in options if option.name.isidentifier()}
    for text in (command.help, *(option.help for option in options)):
        assert "``" not in text and "As in `" not in text
        assert not any(f"`{name}`" in text for name in names)
        assert text.count("Repeatable") <= 1


def test_words_of_a_docstring_become_those_of_a_command_line(run):
    text = " ".join(run("extract", "--help").out.split())
    assert "Upper bound for --rank auto and --energy." in text  # ``rank="auto"`` and `energy`
    assert "Replace an existing DST." in text and "that of TUNED" in text
    assert "Leave out matching tensors. Repeatable." in text
