"""What runs out, and what is taken away meanwhile, is said in a sentence."""

import errno
import resource
import subprocess
import sys

import pytest

from loraformat import cli
from loraformat.demo import SMALL_MODEL
from loraformat.errors import MissingDependencyError

_TRUNCATED = """
import mmap, os, sys
from loraformat import cli

def read(arguments):
    with open(sys.argv[1], "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        os.truncate(sys.argv[1], 0)
        return len(mapped[:8192])

cli._run = read
cli.main([])
"""


def child(*arguments, **options):
    words = [sys.executable, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **options)


def test_a_mapped_file_that_is_truncated_ends_in_a_sentence(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 16))
    done = child("-c", _TRUNCATED, tmp_path / "file")
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("error: a file that was being read became shorter")
    assert done.stderr.count("\n") == 1


def test_too_little_address_space_ends_in_a_sentence():
    def little():
        resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))

    done = child("-m", "loraformat", "generate", SMALL_MODEL, "--prompt", "x", preexec_fn=little)
    assert done.returncode == 6, done.stderr
    assert "not enough address space: 0.4 GB are allowed" in done.stderr.splitlines()[-1]


def _behind(error):
    made = MissingDependencyError("torch is not installed")
    made.__context__ = error
    return made


@pytest.mark.parametrize(
    "error, code, said",
    [
        (RuntimeError("can't start new thread"), 6, "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 6, "ulimit -u"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 6, "not enough memory"),
        (MemoryError(), 6, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 6, "memory"),
        (
            _behind(ImportError("libtorch.so: failed to map segment from shared object")),
            6,
            "memory",
        ),
        (MissingDependencyError("torch is not installed"), 1, "torch is not installed"),
        (ValueError("odd"), 1, "internal error, ValueError: odd"),
    ],
)
def test_what_ran_out_is_said(monkeypatch, capsys, error, code, said):
    def fail(*_, **__):
        raise error

    monkeypatch.delenv("LORAFORMAT_DEBUG", raising=False)
    monkeypatch.setattr(cli.commands, "main", fail)
    assert cli._run([]) == code
    assert said in capsys.readouterr().err
