"""Writes the matrix in ``docs/runtimes.md`` from the rules; ``--check`` fails if it is out of date.

What stands between the two marks is made here; the rest of the page is written by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loraformat.runtimes.known import RUNTIMES
from loraformat.runtimes.record import Rule, Runtime
from loraformat.runtimes.rules import RULES

_PAGE = Path(__file__).parent.parent / "docs" / "runtimes.md"
_BEGIN = "<!-- made by tools/make_runtime_docs.py; do not edit -->"
_END = "<!-- end of what is made -->"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(rule: Rule, runtime: Runtime) -> str:
    treatment = rule.treatment(runtime)
    if treatment is None:
        return ""
    words = {"refuses": "**refuses**", "differs": "**differs**"}
    return words.get(treatment.outcome, treatment.outcome)


def _matrix() -> str:
    runtimes = list(RUNTIMES.values())
    head = ["rule", "an adapter with", *(runtime.title for runtime in runtimes)]
    rows = [
        [f"`{rule.id}`", rule.about, *(_cell(rule, runtime) for runtime in runtimes)]
        for rule in RULES
    ]
    return _table(head, rows)


def _runtimes() -> str:
    rows = [[f"`{r.name}`", r.title, r.version, r.format_why] for r in RUNTIMES.values()]
    return _table(["`--runtime`", "program", "facts from", "reads"], rows)


def _reasons() -> str:
    """Return why, once for each sentence, with the runtimes that share it."""
    parts = []
    for rule in RULES:
        by_reason: dict[str, list[str]] = {}
        for runtime in RUNTIMES.values():
            treatment = rule.treatment(runtime)
            if treatment is not None:
                by_reason.setdefault(treatment.why, []).append(runtime.title)
        lines = [
            f"- {'every runtime' if len(titles) == len(RUNTIMES) else ', '.join(titles)}: {why}."
            for why, titles in by_reason.items()
        ]
        parts.append(f"**`{rule.id}`**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _made() -> str:
    return "\n\n".join([_BEGIN, _runtimes(), _matrix(), "## Why", _reasons(), _END])


def _page() -> str:
    before, _, rest = _PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    return before + _made() + after


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if the page would change.")
def main(check: bool) -> None:
    """Write the matrix, or compare it."""
    page = _page()
    if not check:
        _PAGE.write_text(page, encoding="utf-8")
    elif _PAGE.read_text(encoding="utf-8") != page:
        click.echo("docs/runtimes.md is old; run: python tools/make_runtime_docs.py", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
