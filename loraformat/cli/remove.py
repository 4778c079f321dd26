"""``loraformat remove``."""

from __future__ import annotations

import click

from loraformat.cli.console import echo_json, json_option, quiet_option, say

_EXAMPLE = """\b
Example:
  loraformat remove my-bundle/adapters/medical
"""


@click.command(epilog=_EXAMPLE)
@click.argument("path")
@json_option
@quiet_option
def command(path: str, as_json: bool, quiet: bool) -> None:
    """Remove an adapter from a bundle.

    PATH is BUNDLE/adapters/NAME. The adapter is removed from the manifest first, then its files
    are deleted. Nothing else in the bundle changes.
    """
    from loraformat.ops.remove import remove

    place = remove(path)
    if as_json:
        echo_json("remove", {"bundle": str(place.bundle), "adapter": place.name})
    elif not quiet:
        say(f"removed adapter {place.name} from {place.bundle}")
