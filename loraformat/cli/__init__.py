"""The command line: ``loraformat VERB ...``.

One module per verb, imported when the verb is called, so that ``--help`` costs
nothing. `main` turns errors into one line on stderr and an exit code.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from loraformat.cli.console import Resumable, clean
from loraformat.cli.limits import limit_of, refuse_torch_without_room
from loraformat.errors import LoraFormatError, MissingDependencyError
from loraformat.tensors.truncation import say_truncated
from loraformat.version import __version__

__all__ = ["commands", "main"]

#: Verb and its line in ``--help``; the verb's module holds a click command named ``command``.
_VERBS = {
    "check": "Check how inference runtimes load an adapter; fix it.",
    "combine": "Combine several adapters into one.",
    "convert": "Convert a model or an adapter to another format.",
    "demo": "Run every verb on a small bundled model and its adapters.",
    "eval": "Measure loss and perplexity with and without adapters.",
    "extract": "Extract an adapter from a base and its fine-tune.",
    "formats": "List the converters, their directions and their limits.",
    "generate": "Generate text, with or without an adapter.",
    "info": "Describe a model or an adapter without reading its weights.",
    "merge": "Merge adapters into a base and write a new model.",
    "pull": "Download a repository from the Hub and verify every file.",
    "push": "Publish an adapter or a bundle on the Hub with a model card.",
    "reduce": "Reduce an adapter's rank with the smallest possible error.",
    "remove": "Remove an adapter from a bundle.",
    "spectrum": "Show the singular value spectrum and effective ranks of an adapter.",
    "train": "Train a LoRA adapter on a memory-mapped bundle.",
    "unmerge": "Undo a merge and restore the base.",
    "verify": "Verify structure and hashes.",
}

_INTERRUPTED = 130
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class _PathOrHubId(click.types.StringParamType):
    """Parameter type for paths and Hub ids; the shell completes file names."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class _LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(_VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        command = import_module(f"loraformat.cli.{name}").command
        assert isinstance(command, click.Command)
        for parameter in command.params:
            if isinstance(parameter, click.Argument) and parameter.type is click.STRING:
                parameter.type = _PathOrHubId()
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(sorted(_VERBS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 input invalid, 4 verify or check reported "
    "findings, 5 output exists or is locked, 6 no space or memory, 7 network or Hub, 130 "
    "interrupted (run the same command again to continue).",
)
@click.version_option(__version__, "-V", "--version", prog_name="loraformat")
def commands() -> None:
    """NF4 base weights and LoRA deltas: convert, train, merge, check, publish.

    Inputs are local paths or Hub ids (org/name, org/name@revision).
    """


def main(arguments: list[str] | None = None) -> None:
    """Run a command line, that of this process by default, and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not sys.stderr.isatty():  # huggingface_hub would draw its bars into a file, too
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # OpenMP's threads spin while they wait, which on a shared machine takes the time of those that
    # work: training took five times the CPU seconds. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    say_truncated()
    refuse_torch_without_room()
    with _termination_as_interrupt():
        code = _run(arguments)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        code: Any = commands.main(args=arguments, prog_name="loraformat", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.UsageError as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
            return error.exit_code
        return _fail(_usage(error), error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except LoraFormatError as error:
        if isinstance(error, MissingDependencyError) and (limit := limit_of(error)):
            return _fail(limit, 6)  # it is installed, and could not be mapped
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        goes_on = isinstance(stop.__cause__, Resumable)  # click makes an Abort of it
        more = ["--resume"] if goes_on and "--resume" not in arguments else []
        program = _program() if goes_on else ["loraformat"]
        again = shlex.join([*program, *arguments, *more])
        return _fail(f"interrupted; no output is damaged. To continue, run: {again}", _INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()  # whoever read our output has left
        return 1
    except Exception as error:
        if os.environ.get("LORAFORMAT_DEBUG"):
            raise
        return _unexpected(error)


def _usage(error: click.UsageError) -> str:
    """Return click's usage error in loraformat's form: problem and advice."""
    said = " ".join(error.format_message().split()).rstrip(".")
    verb = error.ctx.command_path if error.ctx is not None else "loraformat"
    return f"{said[:1].lower()}{said[1:]}; see {verb} --help"


def _program() -> list[str]:
    """Return the command that starts this program with its number of processes."""
    processes = os.environ.get("WORLD_SIZE", "1")
    here = os.environ.get("LOCAL_WORLD_SIZE", processes)
    if processes == "1":
        return ["loraformat"]
    machines = [] if here == processes else ["--nnodes", str(int(processes) // int(here))]
    return ["torchrun", *machines, "--nproc-per-node", here, "-m", "loraformat"]


def _unexpected(error: Exception) -> int:
    if (limit := limit_of(error)) is not None:
        return _fail(limit, 6)
    if isinstance(error, OSError):
        _drop_stdout()  # it may be what failed, and Python writes to it again at exit
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 6 if error.errno in _NO_ROOM else 1)
    return _fail(
        f"internal error, {type(error).__name__}: {error} "
        "(please report it; LORAFORMAT_DEBUG=1 shows where)",
        1,
    )


def _drop_stdout() -> None:
    """Redirect stdout to the null device, so that Python's final flush cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Make SIGTERM leave as cleanly as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> int:
    # One line, whatever a stranger's file, or another library, put into the message.
    click.echo(f"error: {clean(message)}", err=True)
    return code
