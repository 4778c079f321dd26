"""Shell completion of arguments."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

__all__ = ["PATH"]


class _PathOrHubId(click.types.StringParamType):
    """Parameter type for paths and Hub ids; the shell completes file names."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Ask the shell for files."""
        return [CompletionItem(incomplete, type="file")]


PATH = _PathOrHubId()
