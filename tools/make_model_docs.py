"""Writes the classes that training refuses into ``docs/training-models.md``; ``--check`` compares.

They are those of the tests' table, which ``make real`` holds against every class of transformers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

_ROOT = Path(__file__).parent.parent
_PAGE = _ROOT / "docs" / "training-models.md"
_BEGIN = "<!-- made by tools/make_model_docs.py; do not edit -->\n"
_END = "<!-- end of what is made -->"


def _table() -> str:
    sys.path.insert(0, str(_ROOT))
    from tests.train.causal_models import NOT_BUILT, REFUSED

    by_reason: dict[str, list[str]] = {}
    for model_type, (_, reason) in (REFUSED | NOT_BUILT).items():
        by_reason.setdefault(reason, []).append(f"`{model_type}`")
    lines = [f"| {', '.join(types)} | {reason} |" for reason, types in by_reason.items()]
    return "\n".join(["| not trained | why |", "|---|---|", *lines]) + "\n"


@click.command()
@click.option("--check", is_flag=True, help="Only tell whether the page is up to date.")
def main(check: bool) -> None:
    """Write the table into the page."""
    page = _PAGE.read_text(encoding="utf-8")
    before, rest = page.split(_BEGIN)
    made = f"{before}{_BEGIN}{_table()}{_END}{rest.split(_END)[1]}"
    if check and made != page:
        click.echo("docs/training-models.md is old; run: python tools/make_model_docs.py", err=True)
        sys.exit(1)
    if not check:
        _PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
