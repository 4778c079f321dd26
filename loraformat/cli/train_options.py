"""Options made from the table of a run's settings, and help with their sections."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from loraformat.storage.byte_sizes import parse_size
from loraformat.train.run import config_file
from loraformat.train.run.options import SETTINGS, Setting

__all__ = [
    "DATA_SETTINGS",
    "MACHINE_SETTINGS",
    "SectionedCommand",
    "given_settings",
    "setting_options",
]

#: The headings, in this order; what stands under none of them is for all verbs.
_SECTIONS = ("Data", "Adapter", "Optimisation", "Memory", "Evaluation", "Output", "Other")
#: Options of a command that are no settings of a run.
_OUTPUT = ("output", "resume", "force", "dry_run")
_MACHINE = ("allow_base_mismatch", "device", "compute_dtype", "device_memory")
#: Where a model computes, and with which adapter.
MACHINE_SETTINGS = [setting for setting in SETTINGS if setting.name in _MACHINE]
#: How held-out data become batches.
DATA_SETTINGS = [s for s in SETTINGS if s.section == "Data" and s.name != "shuffle"]


class SectionedCommand(click.Command):
    """A command that lists the trainer's settings under the headings of their table."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of options for each section."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in _SECTIONS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[_section_of(parameter.name)].append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(f"{name} options"):
                    formatter.write_dl(records)


def _section_of(name: str | None) -> str:
    if name in _OUTPUT:
        return "Output"
    return next((setting.section for setting in SETTINGS if setting.name == name), "Other")


def _rank_of_glob(value: str) -> tuple[str, int]:
    """Return a name or glob and a rank, from GLOB=R."""
    glob, _, rank = value.rpartition("=")
    if not glob or not rank.isdecimal() or len(rank) > 6:
        raise ValueError(f"{value!r} is not of the form GLOB=RANK")
    return glob, int(rank)


#: What makes a value of a text, by kind of setting.
_TYPES: dict[str, Any] = {
    "integer": int, "number": float, "size": parse_size, "ranks": _rank_of_glob,
}  # fmt: skip


def setting_options(settings: Iterable[Setting] = SETTINGS) -> list[click.Parameter]:
    """Return an option for each setting; one that is not given is None, or an empty tuple."""
    return [_option(setting) for setting in settings if setting.section != "run"]


def _option(setting: Setting) -> click.Option:
    flag = f"--{setting.flag}"
    words = f"{setting.help}{_default(setting)}"
    if setting.kind == "flag":
        flags = f"{flag}/--no-{setting.flag}"
        return click.Option([flags, setting.name], default=None, help=words)
    many = setting.kind in ("texts", "names", "ranks")
    kind = click.Choice(setting.choices) if setting.choices else _TYPES.get(setting.kind, str)
    return click.Option(
        [flag, setting.name], type=kind, multiple=many, default=None,
        metavar=setting.metavar, help=words,
    )  # fmt: skip


def _default(setting: Setting) -> str:
    value = setting.default
    if setting.kind == "flag":
        return f"  [default: {'' if value else 'no-'}{setting.flag}]"
    if value is None or value in ("", ()):
        return ""
    return f"  [default: {','.join(value) if isinstance(value, tuple) else value}]"


def given_settings(options: dict[str, Any], config: Path | None = None) -> dict[str, Any]:
    """Return those options, by field, that were given: flags over the YAML file.

    None and what is empty was not given.
    """
    values = {} if config is None else config_file.read(config)
    return values | {name: value for name, value in options.items() if value not in (None, (), "")}
