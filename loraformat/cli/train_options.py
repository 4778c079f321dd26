"""The options of ``train``, made from the table in `loraformat.train.run.options`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from loraformat.cli.console import ByteSize
from loraformat.train.run.options import SETTINGS, Setting, TrainOptions, value_of

__all__ = ["chosen", "data_settings", "machine_settings", "setting_options"]

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _RankOfGlob(click.ParamType[tuple[str, int]]):
    """A name or glob and a rank, GLOB=R."""

    name = "glob=rank"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """Return both."""
        glob, found, rank = str(value).rpartition("=")
        if not found or not glob or not rank.isdecimal() or len(rank) > 6:
            self.fail(f"{value!r} is not of the form GLOB=RANK", param, ctx)
        return glob, int(rank)


def setting_options(settings: tuple[Setting, ...] = SETTINGS) -> Callable[[_Command], _Command]:
    """Add a flag for each setting; one that is not given is None, or an empty tuple."""

    def decorate(command: _Command) -> _Command:
        for setting in reversed(settings):
            if setting.section != "run":
                command = _option(setting)(command)
        return command

    return decorate


def machine_settings() -> tuple[Setting, ...]:
    """Return those settings that say where a model computes."""
    return tuple(s for s in SETTINGS if s.name in ("device", "compute_dtype", "device_memory"))


def data_settings() -> tuple[Setting, ...]:
    """Return those settings that say how held-out data become batches."""
    return tuple(s for s in SETTINGS if s.section == "Data" and s.name != "shuffle")


def _option(setting: Setting) -> Callable[[_Command], _Command]:
    flag = f"--{setting.flag}"
    words = f"{setting.help}{_default(setting)}"
    if setting.kind == "flag":
        return click.option(f"{flag}/--no-{setting.flag}", setting.name, default=None, help=words)
    many = setting.kind in ("texts", "names", "ranks")
    return click.option(
        flag, setting.name, type=_type(setting), multiple=many, default=None,
        metavar=setting.metavar, help=words,
    )  # fmt: skip


def _default(setting: Setting) -> str:
    value = setting.default
    if setting.kind == "flag":
        return f"  [default: {'' if value else 'no-'}{setting.flag}]"
    if value is None or value in ("", ()):
        return ""
    return f"  [default: {','.join(value) if isinstance(value, tuple) else value}]"


def _type(setting: Setting) -> Any:
    if setting.choices:
        return click.Choice(setting.choices)
    kinds: dict[str, Any] = {
        "integer": int, "number": float, "size": ByteSize(), "ranks": _RankOfGlob(),
    }  # fmt: skip
    return kinds.get(setting.kind, str)


def chosen(given: dict[str, Any], config: Path | None) -> TrainOptions:
    """Return the options: flags over the YAML file over defaults.

    Parameters
    ----------
    given : dict
        Flags by field; None and empty tuples were not given.
    config : Path, optional

    Raises
    ------
    InputError, UsageError
    """
    values: dict[str, Any] = {}
    if config is not None:
        from loraformat.train.run.config_file import read

        values = read(config)
    for setting in SETTINGS:
        value = given.get(setting.name)
        if value is None or value in ((), ""):
            continue
        values[setting.name] = value_of(setting, value)
    return TrainOptions(**values)
