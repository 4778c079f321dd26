"""Commands whose options stand in sections of their help."""

from __future__ import annotations

import click

from loraformat.train.run.options import SETTINGS

__all__ = ["SectionedCommand"]

#: The headings, in this order; what stands under none of them is for all verbs.
_SECTIONS = ("Data", "Adapter", "Optimisation", "Memory", "Evaluation", "Output", "Other")
#: Options of a command that are no settings of a run.
_OUTPUT = ("output", "resume", "force", "dry_run")


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
