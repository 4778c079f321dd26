"""``loraformat verify``."""

from __future__ import annotations

import click

from loraformat.cli.console import echo_json, json_option, progress_bar, quiet_option, say
from loraformat.cli.options import allow_pickle_option

_EXAMPLE = """\b
Example:
  loraformat verify my-bundle
  loraformat verify my-bundle/adapters/medical
"""

_FOUND_SOMETHING = 4


@click.command(epilog=_EXAMPLE)
@click.argument("path")
@allow_pickle_option
@json_option
@quiet_option
def command(path: str, allow_pickle: bool, as_json: bool, quiet: bool) -> int:
    """Verify structure and hashes; exit with code 4 on a finding.

    PATH is a local path or a Hub id, of a model or an adapter. A bundle, or an adapter in one, is
    verified against the hashes in its manifest. Other formats have no hashes: their headers and
    scales are checked, and an adapter's factor pairs, shapes and values.
    """
    from loraformat.ops.verify import verify

    with progress_bar("verify", quiet=quiet) as progress:
        result = verify(path, allow_pickle=allow_pickle, progress=progress)
    if as_json:
        echo_json("verify", result.to_dict())
    else:
        for finding in result.findings:
            rule = f"{finding.rule}: " if finding.rule else ""
            say(f"{rule}{finding.path}: {finding.problem}")
        if not result.findings and not quiet:
            hashes = (
                "every hash matches" if result.hashed else "this format has no hashes to compare"
            )
            say(f"sound: {result.format}, {result.tensors} tensors; {hashes}")
    return _FOUND_SOMETHING if result.findings else 0
