"""Write the outputs in docs/tutorial.md and docs/adapters.md anew, by running their commands.

Tests hold the pages to what the commands print; run this after their words have changed::

    python tools/make_tutorial.py             # both; a few minutes
    python tools/make_tutorial.py adapters

Publishing and fetching go to the Hub of the tests, on the loopback interface.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
from pages import ROOT, loopback_hub, with_outputs

PAGES = ("adapters", "tutorial")


@click.command()
@click.argument("pages", nargs=-1, type=click.Choice(PAGES))
def main(pages: tuple[str, ...]) -> None:
    """Rewrite the pages."""
    for name in pages or PAGES:
        path = ROOT / "docs" / f"{name}.md"
        with (
            tempfile.TemporaryDirectory() as scratch,
            tempfile.TemporaryDirectory() as home,
            loopback_hub(Path(home)) as variables,
        ):
            text = with_outputs(path.read_text(encoding="utf-8"), Path(scratch), variables)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
