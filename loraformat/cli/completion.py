"""Shell completion of arguments."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

__all__ = ["PATH"]


class _PathOrHubId(click.types.StringParamType):
    """Text that is usually a path: the shell completes the names of files."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Ask the shell for files."""
        return [CompletionItem(incomplete, type="file")]


PATH = _PathOrHubId()
