"""What holds for every verb: help, JSON, silence, exit codes, one line per error."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loraformat import __version__
from loraformat.cli import _VERBS, commands, main
from loraformat.demo import SMALL_MODEL
from loraformat.ops.convert.convert import convert

VERBS = sorted(_VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(run, verb):
    result = run(verb, "--help")
    assert result.code == 0
    assert f"Example:\n    loraformat {verb}" in result.out
    assert result.err == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json_and_quiet(verb):
    command = commands.get_command(None, verb)
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {"--json", "--quiet"} <= flags


def test_help_lists_every_verb_and_every_exit_code(run):
    result = run("--help")
    assert all(verb in result.out for verb in VERBS)
    for code in (
        "0 done",
        "1 error",
        "2 usage",
        "3 input",
        "4 verify or check",
        "5 output",
        "6 no space",
        "7",
        "130",
    ):
        assert code in result.out.replace("\n  ", " ")


def test_version(run):
    assert run("--version").out == f"loraformat, version {__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], *([verb, "--help"] for verb in VERBS), ["--version"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom loraformat.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'gguf', 'tqdm'}\n"
        "sys.exit(sorted(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("verb", ["info", "verify"])
def test_looking_needs_no_torch(model, bundle, tmp_path, verb):
    convert(SMALL_MODEL, tmp_path / "model.gguf", dtype="f16")
    code = (
        "import sys\nfrom loraformat.cli import main\n"
        f"for path in {[str(path) for path in (model, bundle, tmp_path / 'model.gguf')]}:\n"
        f"    try: main([{verb!r}, path])\n"
        "    except SystemExit as leave: assert leave.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_python_m(command):
    assert command("--version").stdout == f"loraformat, version {__version__}\n"


# JSON and silence


def json_calls(model, bundle, tmp_path):
    return {
        "convert": ["convert", model, tmp_path / "new", "--to", "safetensors"],
        "dry run": ["convert", model, tmp_path / "newer", "--dry-run"],
        "info": ["info", bundle],
        "info of tensors": ["info", bundle, "--tensors"],
        "verify": ["verify", bundle],
        "formats": ["formats"],
    }


CALLS = ["convert", "dry run", "info", "info of tensors", "verify", "formats"]


@pytest.mark.parametrize("call", CALLS)
def test_json_is_alone_on_stdout(run, model, bundle, tmp_path, call):
    arguments = json_calls(model, bundle, tmp_path)[call]
    result = run(*arguments, "--json")
    assert result.code == 0
    members = json.loads(result.out)
    assert members["schema"] == f"loraformat.{arguments[0]}"
    assert members["schema_version"] == 1
    quiet = run(*json_calls(model, bundle, tmp_path / "q")[call], "--json", "--quiet")
    if call != "convert":  # whose target's parent is missing now
        assert json.loads(quiet.out)["schema"] == members["schema"]


@pytest.mark.parametrize("call", CALLS)
def test_quiet(run, model, bundle, tmp_path, call):
    result = run(*json_calls(model, bundle, tmp_path)[call], "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_progress_is_on_stderr_and_only_on_a_terminal(command, model, tmp_path):
    result = command("convert", model, "out", "--to", "safetensors")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "wrote safetensors out" in result.stdout


def test_progress_on_a_terminal(model, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    convert = ["convert", model, tmp_path / "out", "--to", "safetensors", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", EAGER, *convert], stdout=subprocess.PIPE, stderr=theirs, text=True
    )
    os.close(theirs)
    shown = read_all(ours)
    out = process.communicate(timeout=60)[0]
    assert json.loads(out)["schema"] == "loraformat.convert"
    assert "convert:" in shown
    assert "100%" in shown


EAGER = """
import sys
from tqdm import tqdm
original = tqdm.__init__
def eager(self, *a, **k):
    original(self, *a, **{**k, "delay": 0, "mininterval": 0})
tqdm.__init__ = eager
from loraformat.cli import main
main(sys.argv[1:])
"""


def read_all(descriptor):
    pieces = []
    try:
        while piece := os.read(descriptor, 1 << 16):
            pieces.append(piece)
    except OSError:  # Linux's way to say that the other side is closed
        pass
    os.close(descriptor)
    return b"".join(pieces).decode()


# Exit codes: 3, 4, 5 and 6 are in the other files too, 7 in tests/hub, 130 in tests/publish


def is_one_line(text):
    return text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n")


def test_exit_1_for_an_internal_error(run, model, tmp_path, monkeypatch):
    def explode(*arguments, **options):
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr("loraformat.ops.convert.convert.convert", explode)
    monkeypatch.delenv("LORAFORMAT_DEBUG", raising=False)
    result = run("convert", model, tmp_path / "out")
    assert result.code == 1
    assert is_one_line(result.err)
    assert "internal error, RuntimeError: boom" in result.err
    assert "LORAFORMAT_DEBUG=1" in result.err
    monkeypatch.setenv("LORAFORMAT_DEBUG", "1")
    with pytest.raises(RuntimeError):
        main(["convert", str(model), str(tmp_path / "out")])


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"],
        ["convert"],
        ["convert", "a"],
        ["convert", "a", "b", "--no-such-option"],
        ["convert", "MODEL", "out", "--dtype", "f17"],
        ["convert", "MODEL", "out", "--max-shard-size", "much"],
        ["convert", "MODEL", "out", "--max-shard-size", "0"],
        ["convert", "MODEL", "out", "--block-size", "63"],
        ["convert", "MODEL", "out", "--block-size", "x"],
        ["convert", "MODEL", "out", "--to", "nonsense"],
        ["convert", "MODEL", "out", "--from", "nonsense"],
        ["convert", "MODEL", "out", "--to", "safetensors", "--block-size", "64"],
        ["info"],
        ["verify"],
        ["verify", "a", "b"],
    ],
)
def test_exit_2_for_usage(run, model, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = run(*(model if argument == "MODEL" else argument for argument in arguments))
    assert result.code == 2
    assert result.out == ""
    assert result.err.rstrip().splitlines()[-1].lower().startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_no_arguments_shows_help(run):
    result = run()
    assert result.code in (0, 2)
    assert "Usage: loraformat" in result.out + result.err


def test_exit_3_for_a_missing_input(run, tmp_path):
    for arguments in (["info", "nowhere"], ["verify", "nowhere"], ["convert", "nowhere", "out"]):
        result = run(*arguments)
        assert result.code == 3
        assert result.err == (
            "error: nowhere: no such file or directory; Hub ids have the form org/name\n"
        )


def test_exit_5_for_an_existing_output_and_force(run, model, tmp_path):
    arguments = ["convert", model, tmp_path / "out", "--to", "safetensors"]
    assert run(*arguments).code == 0
    result = run(*arguments)
    assert result.code == 5
    assert result.err == f"error: {tmp_path / 'out'}: already exists; use --force to replace it\n"
    assert run(*arguments, "--force").code == 0


def test_exit_5_for_the_input_as_output(run, model):
    result = run("convert", model, model, "--to", "safetensors", "--force")
    assert result.code == 5
    assert "is or contains the input" in result.err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_exit_6_when_memory_or_disk_runs_out(run, model, tmp_path, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("loraformat.ops.convert.convert.convert", fail)
    monkeypatch.setattr("loraformat.cli._drop_stdout", lambda: None)
    result = run("convert", model, tmp_path / "out")
    assert result.code == 6
    assert is_one_line(result.err)


def test_exit_6_when_the_kernel_refuses_memory(command, tmp_path):
    """A model that is mapped does not need memory; reading it with pread does."""
    import resource

    directory = tmp_path / "large"
    directory.mkdir()
    size = 4 << 30
    text = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)  # a sparse file: no disk is needed either
    limit = 2 << 30
    result = command(
        "convert", directory, "out", "--to", "safetensors", env={"LORAFORMAT_IO": "pread"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 6
    assert is_one_line(result.stderr)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_exit_130(run, model, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("loraformat.ops.convert.convert.convert", interrupt)
    result = run("convert", model, tmp_path / "a name", "--to", "safetensors")
    assert result.code == 130
    assert f"To continue, run: loraformat convert {model} '{tmp_path / 'a name'}'" in result.err


# Pipes


def test_a_reader_that_leaves(model, tmp_path):
    """As in ``loraformat info MODEL --tensors | head -1``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "loraformat", "info", model, "--tensors"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), said) == (1, b"")


def test_a_full_stdout(model):
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "loraformat", "info", model],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert result.returncode == 6
    assert is_one_line(result.stderr)
