"""``loraformat check``."""

from __future__ import annotations

from itertools import chain
from typing import Any

import click

import loraformat
from loraformat.cli.console import echo_json, say, table
from loraformat.cli.options import verb_command
from loraformat.errors import UsageError

_EXAMPLE = """\b
Example:
  loraformat check my-adapter --base meta-llama/Llama-3.2-1B
  loraformat check my-adapter --runtime vllm --runtime llama.cpp --json
  loraformat check my-adapter --fix -o my-adapter-fixed
  loraformat check my-adapter-fixed --base my-model --write run
"""

_FOUND_SOMETHING = 4
_WORDS = {"right": "right", "care": "right, with conditions", "wrong": "WRONG"}
_FIXING = [
    click.Option(
        ["--fix", "fixing"],
        is_flag=True,
        help="Write a portable form of the adapter to OUT and check that.",
    ),
    click.Option(["-o", "--output"], metavar="OUT", help="With --fix: the new adapter."),
    click.Option(
        ["--dtype"],
        type=click.Choice(["f32", "f16", "bf16"]),
        help="With --fix: dtype of the factors. [default: unchanged if lossless]",
    ),
    click.Option(
        ["--experts"],
        type=click.Choice(["each", "fused"]),
        help="With --fix: one LoRA for each expert, or for the fused parameter.",
    ),
    click.Option(["--force"], is_flag=True, help="With --fix: overwrite an existing OUT."),
]


def _run(
    adapter: str,
    fixing: bool,
    output: str | None,
    dtype: str | None,
    experts: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    _refuse_options(fixing, output, dtype=dtype, experts=experts, force=force)
    fixed = None
    if output is not None:
        given = {name: options[name] for name in ("base", "allow_pickle")}
        given["experts"] = experts
        fixed = loraformat.fix(adapter, output, dtype=dtype, force=force, **given)
    report = loraformat.check(output or adapter, **options)
    if as_json:
        members = report.to_dict()
        if fixed is not None:
            members["fixed"] = fixed.to_dict()
        echo_json("check", members)
    elif not quiet:
        if fixed is not None:
            say(f"wrote {fixed.target}: {fixed.modules} modules, rank {fixed.ranks[0]}\n")
        say("\n".join(_text(report)))
    return _FOUND_SOMETHING if report.failed else 0


def _refuse_options(fixing: bool, output: str | None, **others: object) -> None:
    if fixing and output is None:
        raise UsageError("--fix needs an output", hint="add -o OUT")
    given = {"-o": output, **{f"--{name}": value for name, value in others.items()}}
    for option, value in given.items():
        if value and not fixing:
            raise UsageError(f"{option} is for --fix", hint="add --fix, or omit it")


def _text(report: Any) -> list[str]:
    ranks = ", ".join(map(str, report.ranks)) or "none"
    against = f", compared with {report.base or 'no base (use --base)'}"
    lines = [f"{report.format} {report.path}: {report.modules} modules, rank {ranks}{against}", ""]
    found = {name: [f for f in report.findings if f.runtime == name] for name in report.verdicts}
    rows = [
        [runtime, _WORDS[verdict], ", ".join(finding.rule for finding in found[runtime]) or "-"]
        for runtime, verdict in report.verdicts.items()
    ]
    lines.append(table(["runtime", "result", "findings"], rows))
    for finding in chain(*found.values()):
        lines += ["", *_finding(finding)]
    if (written := report.written) is not None:
        lines += ["", f"wrote {written.path}: {', '.join(written.files)}"]
        lines += [f"note: no file for {sentence}" for sentence in written.left_out]
    return lines


def _finding(finding: Any) -> list[str]:
    remedy = ": ".join(filter(None, (finding.remedy, finding.command)))
    head = f"{finding.level} {finding.runtime} {finding.rule}: {finding.what}"
    return [head, f"  {finding.why}", *([f"  {remedy}"] if remedy else [])]


command = verb_command(
    "check",
    _EXAMPLE,
    _run,
    summary="Check how inference runtimes load an adapter; exit with code 4 on a failure.",
    metavars={"runtime": "NAME", "write": "DIR"},
    extra={"write": _FIXING},
)
