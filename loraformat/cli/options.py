"""Command-line options used by several verbs.

Each is a decorator, or makes one from what differs: the help text's noun.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import click

from loraformat.cli.console import ByteSize, report_options

__all__ = [
    "ParameterCount",
    "RankOrAuto",
    "WeightType",
    "adapter_options",
    "adapter_output_option",
    "allow_base_mismatch_option",
    "allow_pickle_option",
    "base_option",
    "dry_run_option",
    "dtype_option",
    "energy_option",
    "force_option",
    "from_option",
    "gguf_options",
    "max_rank_option",
    "max_shard_size_option",
    "model_output_options",
    "output_option",
    "skip_option",
    "weight_option",
    "writing_options",
]

_Command = TypeVar("_Command", bound=Callable[..., Any])


class ParameterCount(click.ParamType[int]):
    """A number of parameters such as 4M or 500k."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number."""
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGB]?)\s*", str(value).upper())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is not a number of parameters such as 4M", param, ctx)
        powers = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
        return int(float(match[1]) * powers[match[2]])


class RankOrAuto(click.ParamType[int | Literal["auto"]]):
    """A rank, or the word auto."""

    name = "rank"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | Literal["auto"]:
        """Return the rank, or the word."""
        if value == "auto":
            return "auto"
        if not str(value).isdecimal() or not 0 < int(value) < 1 << 31:
            self.fail(f"{value!r} is neither a rank nor auto", param, ctx)
        return int(value)


class WeightType(click.Choice[str]):
    """A type of weights; those that llama.cpp makes are let through to where they are refused."""

    name = "choice"

    def __init__(self) -> None:
        super().__init__(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the type."""
        from loraformat.ops.encoding.llama_quantize import is_llama_type

        if is_llama_type(str(value)):
            return str(value)
        return super().convert(value, param, ctx)


def _stacked(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Return one decorator that adds several options, in this order."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def output_option(help_text: str, metavar: str = "DST") -> Callable[[_Command], _Command]:
    """Name the result."""
    return click.option("-o", "--output", required=True, metavar=metavar, help=help_text)


def dtype_option(help_text: str) -> Callable[[_Command], _Command]:
    """Choose the type of what is written."""
    return click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), help=help_text)


def force_option(what: str = "an existing DST") -> Callable[[_Command], _Command]:
    """Allow to overwrite, which nothing does without it."""
    return click.option("--force", is_flag=True, help=f"Replace {what}.")


def dry_run_option(
    help_text: str = "Print the plan and the sizes without writing anything.",
) -> Callable[[_Command], _Command]:
    """Do everything but write."""
    return click.option("--dry-run", is_flag=True, help=help_text)


def energy_option(help_text: str) -> Callable[[_Command], _Command]:
    """Choose ranks by a share of a squared norm."""
    return click.option(
        "--energy", type=click.FloatRange(0, 1, min_open=True), metavar="E", help=help_text
    )


def max_rank_option(help_text: str, default: int | None = None) -> Callable[[_Command], _Command]:
    """Bound every module's rank."""
    return click.option(
        "--max-rank",
        type=click.IntRange(1),
        default=default,
        show_default=default is not None,
        metavar="R",
        help=help_text,
    )


def weight_option(help_text: str) -> Callable[[_Command], _Command]:
    """Give one factor per adapter."""
    return click.option("--weight", type=float, multiple=True, metavar="W",
                        help=help_text)  # fmt: skip


def base_option(help_text: str) -> Callable[[_Command], _Command]:
    """Name the base of adapters."""
    return click.option("--base", metavar="BASE", help=help_text)


def allow_base_mismatch_option(help_text: str) -> Callable[[_Command], _Command]:
    """Take what was made for another base."""
    return click.option("--allow-base-mismatch", is_flag=True, help=help_text)


adapter_base_option = base_option(
    "Base to compare names and shapes with; a GGUF adapter needs its config.json (a directory "
    "holding only that file is enough). Not needed for an adapter in a bundle."
)
allow_pickle_option = click.option(
    "--allow-pickle",
    is_flag=True,
    help="Also read pickled .bin files, with a loader restricted to tensors.",
)
config_option = click.option(
    "--config",
    metavar="FILE",
    help="config.json of the model in a GGUF file. [default: inferred]",
)
pre_tokenizer_option = click.option(
    "--pre",
    metavar="NAME",
    help="llama.cpp's name of the pre-tokenizer, for a GGUF output. [default: detected]",
)
skip_option = click.option(
    "--skip", multiple=True, metavar="GLOB", help="Leave out matching tensors. Repeatable."
)
max_shard_size_option = click.option(
    "--max-shard-size",
    type=ByteSize(),
    default="2GB",
    show_default=True,
    help="Maximum tensor bytes per file.",
)


def from_option(what: str) -> Callable[[_Command], _Command]:
    """Name the format of an input; the parameter is ``from_``."""
    return click.option(
        "--from", "from_", metavar="FORMAT", help=f"Format of {what}. [default: detected]"
    )


def model_output_options(default: str = "safetensors") -> Callable[[_Command], _Command]:
    """Name the directory and the format of a new model."""
    return _stacked(
        output_option("Output directory.", "OUT"),
        click.option("--to", metavar="FORMAT", help=f"Format of OUT.  [default: {default}]"),
    )


def writing_options(
    replaced: str = "an existing DST",
    dry_run: str = "Print the plan and the sizes without writing anything.",
) -> Callable[[_Command], _Command]:
    """Add what every verb that writes ends with, ``--force`` and ``--dry-run`` first.

    Parameters
    ----------
    replaced : str
        What ``--force`` replaces.
    dry_run : str
        Help of ``--dry-run``.
    """
    return _stacked(force_option(replaced), dry_run_option(dry_run), report_options)


#: The output of a verb that makes an adapter.
adapter_output_option = output_option(
    "Output adapter: a PEFT directory, NAME.gguf for llama.cpp, or BUNDLE/adapters/NAME."
)
#: What a verb that makes an adapter of adapters takes: their type, base and pickles.
adapter_options = _stacked(
    dtype_option("Dtype of the new factors. [default: unchanged]"),
    adapter_base_option,
    allow_base_mismatch_option("Accept an adapter that was made for another base."),
    allow_pickle_option,
)
#: What GGUF files of models leave open.
gguf_options = _stacked(config_option, pre_tokenizer_option)
