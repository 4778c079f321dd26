"""Click commands made from the declarations of the public functions.

Names, defaults, kinds and words of a verb's options are those of its function
(`loraformat.cli.declaration`); the tables below have what only a command line needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import click

import loraformat
from loraformat.cli.console import on_terminal, report_options, show
from loraformat.cli.declaration import Parameter, declaration_of
from loraformat.ops.encoding.llama_quantize import is_llama_type
from loraformat.storage.byte_sizes import parse_size

__all__ = ["WeightType", "parameter_count", "rank_or_auto", "reporting_command", "verb_command"]

#: A function raises ValueError with what is wrong.
_Type = click.ParamType[Any] | Callable[[str], Any]
#: What Python has alone: how progress is shown, and former names.
_PYTHON_ONLY = {"progress", "from_format", "to_format"}
#: Options that a call cannot do without are arguments in Python.
_REQUIRED_OPTIONS = {"output", "prompt"}


def parameter_count(value: str) -> int:
    """Return a number of parameters such as 4M or 500k.

    Examples
    --------
    >>> parameter_count("4M"), parameter_count("1.5k")
    (4000000, 1500)
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGB]?)\s*", value.upper())
    if match is None or not float(match[1]):
        raise ValueError(f"{value!r} is not a number of parameters such as 4M")
    powers = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
    return int(float(match[1]) * powers[match[2]])


def rank_or_auto(value: str) -> int | Literal["auto"]:
    """Return a rank, or the word ``auto``."""
    if value == "auto":
        return "auto"
    if not value.isdecimal() or not 0 < int(value) < 1 << 31:
        raise ValueError(f"{value!r} is neither a rank nor auto")
    return int(value)


class WeightType(click.Choice[str]):
    """Parameter type: a weight dtype; types of llama-quantize are refused later, with advice."""

    name = "choice"

    def __init__(self) -> None:
        super().__init__(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the type."""
        if is_llama_type(str(value)):
            return str(value)
        return super().convert(value, param, ctx)


#: Metavars of options and arguments of several verbs.
_METAVARS = {
    "adapter": "ADAPTER", "adapters": "ADAPTER...", "base": "BASE", "block_size": "N",
    "config": "FILE", "density": "D", "energy": "E", "exclude": "GLOB", "from_": "FORMAT",
    "include": "GLOB", "max_rank": "R", "max_shard_size": "SIZE", "output": "DST", "path": "PATH",
    "pre": "NAME", "rank": "R", "seed": "N", "skip": "GLOB", "target": "DST", "to": "FORMAT",
    "undo": "FILE", "weight": "W",
}  # fmt: skip
_FRACTION = click.FloatRange(0, 1, min_open=True)
#: Types that annotations do not tell.
_TYPES: dict[str, _Type] = {
    "dtype": click.Choice(["f32", "f16", "bf16"]), "density": _FRACTION, "energy": _FRACTION,
    "experts": click.Choice(["each", "fused"]), "max_rank": click.IntRange(1),
    "max_shard_size": parse_size, "rank": click.IntRange(1),
}  # fmt: skip


def verb_command(
    name: str,
    example: str,
    callback: Callable[..., Any],
    *,
    summary: str | None = None,
    only: Sequence[str] | None = None,
    metavars: Mapping[str, str] | None = None,
    types: Mapping[str, _Type] | None = None,
    extra: Mapping[str, Sequence[click.Option]] | None = None,
    settings: Sequence[click.Parameter] = (),
    cls: type[click.Command] = click.Command,
) -> click.Command:
    """Return the command of a function that calls a verb.

    The function is called with the verb's parameters by their names, with the values of `extra`,
    ``as_json`` and ``quiet``.

    Parameters
    ----------
    name : str
        Of the public function.
    example : str
        Stands below the options.
    callback : callable
    summary : str, optional
        Replaces the first line of the verb's docstring.
    only : sequence of str, optional
        Parameters of the function; all by default.
    metavars, types : mapping, optional
        Of those parameters that have others here than in other verbs.
    extra : mapping of str to sequence of Option, optional
        Options that Python has not, each before the option that is named.
    settings : sequence of Parameter
        Further options.
    cls : type
        Of the command.
    """
    names, kinds = {**_METAVARS, **(metavars or {})}, {**_TYPES, **(types or {})}
    parameters: list[click.Parameter] = []
    for parameter in declaration_of(name).parameters.values():
        if parameter.name in _PYTHON_ONLY or (only and parameter.name not in only):
            continue
        parameters += (extra or {}).get(parameter.name, ())
        metavar, kind = names.get(parameter.name), kinds.get(parameter.name)
        if parameter.default is ... and parameter.name not in _REQUIRED_OPTIONS:
            several = -1 if "Sequence" in parameter.annotation else 1
            parameters.append(
                click.Argument([parameter.name], metavar=metavar, nargs=several, required=True)
            )
        else:
            parameters.append(_option(parameter, kind, metavar))
    for each in parameters:
        if isinstance(each, click.Option):
            each.help = _words(each.help or "", parameters)
    parameters += settings
    first, *rest = declaration_of(name).text.split("\n\n")
    text = "\n\n".join(_words(part, parameters) for part in (summary or first, *rest))
    command = click.command(cls=cls, epilog=example, help=text, params=parameters)
    return command(report_options(callback))


def reporting_command(
    name: str, example: str, text: Callable[[Any], str], **details: Any
) -> click.Command:
    """Return a command that calls a verb and prints its report, or the `text` that is made of it.

    The rest is as in `verb_command`.
    """

    def callback(as_json: bool, quiet: bool, **options: Any) -> None:
        if "progress" in declaration_of(name).parameters:
            options["progress"] = on_terminal(quiet)
        report = getattr(loraformat, name)(**options)
        show(name, report, text, as_json=as_json, quiet=quiet)

    return verb_command(name, example, callback, **details)


def _option(parameter: Parameter, kind: _Type | None, metavar: str | None) -> click.Option:
    flag, text = f"--{parameter.name.strip('_').replace('_', '-')}", _text_of(parameter)
    default, required = parameter.default, parameter.default is ...
    if parameter.annotation == "bool" and not default:
        return click.Option([flag, parameter.name], is_flag=True, help=text)
    if parameter.annotation.startswith("bool"):
        flags = f"{flag}/--no-{flag[2:]}"
        return click.Option([flags, parameter.name], default=default, show_default=True, help=text)
    several = "Sequence" in parameter.annotation
    if several:
        text, default_note, rest = text.partition(" [default")
        text = f"{text} Repeatable.{default_note}{rest}"
    defaults = {} if required or several else {"default": default}  # None counts as one
    return click.Option(
        ["-o", flag, parameter.name] if parameter.name == "output" else [flag, parameter.name],
        type=kind or {"int": click.INT, "float": click.FLOAT}.get(parameter.annotation.split()[0]),
        multiple=several,
        required=required,
        show_default=not several,
        metavar=metavar,
        help=text,
        **defaults,
    )


def _text_of(parameter: Parameter) -> str:
    """Return what a docstring says of a parameter, or that which it refers to."""
    if verb := re.fullmatch(r"As in `(\w+)`.*", parameter.text):
        return _text_of(declaration_of(verb[1]).parameters[parameter.name])
    return parameter.text


def _words(text: str, parameters: Sequence[click.Parameter]) -> str:
    """Return words of a docstring as a command line says them: ``--rank`` for `rank`."""
    shown = {}
    for each in parameters:
        flag = max(each.opts, key=len)
        name = flag.strip("-").replace("-", "_")
        shown[name] = flag
        if isinstance(each, click.Argument) or name == "output":
            shown[name] = (each.metavar or name.upper()).removesuffix("...")
    known = "|".join(shown) or "$"
    text = re.sub(
        rf'``({known})="?([^"`]+)"?``', lambda match: f"{shown[match[1]]} {match[2]}", text
    )
    text = re.sub(rf"(?<!`)`({known})`(?!`)", lambda match: shown[match[1]], text)
    return text.replace("``", "")
