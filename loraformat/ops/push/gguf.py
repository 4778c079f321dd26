"""The GGUF file of an adapter, made on the way to the Hub."""

from __future__ import annotations

from pathlib import Path

from loraformat.card import Base
from loraformat.errors import LoraFormatError
from loraformat.hub.source import download
from loraformat.model.config_json import CONFIG_NAME
from loraformat.ops.convert.convert import convert
from loraformat.ops.push.upload_file import UploadFile
from loraformat.storage.safe_directory import SafeDirectory

__all__ = ["gguf_file", "gguf_name", "gguf_pattern"]


def gguf_name(repo: str) -> str:
    """Return what the file is called in a repository.

    Examples
    --------
    >>> gguf_name("me/polite")
    'polite-lora-f16.gguf'
    """
    return f"{repo.rpartition('/')[2]}-lora-f16.gguf"


def gguf_pattern(repo: str) -> str:
    """Return the glob of the names that such a file may have had."""
    return f"{repo.rpartition('/')[2]}-lora-*.gguf"


def gguf_file(
    adapter: Path,
    repo: str,
    base: Base,
    workplace: Path,
    *,
    given: str | None,
    in_bundle: bool,
    notes: list[str],
) -> UploadFile:
    """Convert an adapter for llama.cpp.

    Parameters
    ----------
    adapter : Path
    repo : str
        Where it will be published, which names it.
    base : Base
        Its ``config.json`` is fetched from the Hub, if nothing nearer has it.
    workplace : Path
        Directory for the file; the caller's to remove.
    given : str or None
        The base that the user named with ``--base``.
    in_bundle : bool
        The adapter lies in a bundle, which is its base.
    notes : list of str
        Gets what a user should know.

    Raises
    ------
    LoraFormatError
        If GGUF cannot hold it, or the base's config cannot be had.
    """
    source: str | Path | None = given
    if given is None and not in_bundle:
        source = download(base.repo, base.revision, only=CONFIG_NAME) / CONFIG_NAME
    try:
        report = convert(adapter, workplace / gguf_name(repo), dtype="f16", base=source)
    except LoraFormatError as error:
        error.hint = f"{error.hint}; or leave out --with-gguf" if error.hint else None
        raise
    notes += [f"{gguf_name(repo)}: {note}" for note in report.notes]
    return UploadFile.of_folder(SafeDirectory(workplace), gguf_name(repo))
