"""``loraformat formats``."""

from __future__ import annotations

import click

from loraformat.cli.console import echo_json, json_option, quiet_option, say

_EXAMPLE = """\b
Example:
  loraformat formats
"""


@click.command(epilog=_EXAMPLE)
@json_option
@quiet_option
def command(as_json: bool, quiet: bool) -> None:
    """List the converters, their directions, what each cannot represent, and missing packages."""
    from loraformat.plugins import all_converters

    converters = all_converters()
    if as_json:
        rows = [
            {
                "name": c.name, "kind": c.kind, "summary": c.summary, "reads": c.reads,
                "writes": c.writes, "loses": list(c.loses), "missing": c.missing(),
            }
            for c in converters
        ]  # fmt: skip
        echo_json("formats", {"formats": rows})
        return
    for converter in converters if not quiet else ():
        ways = " and ".join(
            way for way, does in (("reads", converter.reads), ("writes", converter.writes)) if does
        )
        say(f"{converter.name} ({converter.kind}; {ways})\n    {converter.summary}")
        for loss in converter.loses:
            say(f"    cannot hold: {loss}")
        if missing := converter.missing():
            say(f"    to install: pip install {' '.join(missing)}")
