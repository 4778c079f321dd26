"""The chapter on training: its text, and what is said where a peer is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loraformat.cli.demo import _training
from loraformat.demo import exporting, llama_cpp, training
from loraformat.demo.exporting import compare_with_llama_cpp
from loraformat.demo.llama_cpp import Question, ask
from loraformat.demo.pipeline import DemoReport
from loraformat.demo.step import Workspace
from loraformat.demo.texts import heldout, manual_text
from loraformat.demo.training import train_adapter
from loraformat.errors import LoraFormatError, MissingDependencyError, OutputError


def workspace(directory: Path) -> Workspace:
    return Workspace(directory, say=lambda line: None)


def test_no_held_out_paragraph_is_trained_on() -> None:
    parts = [part.strip() for part in manual_text().split("\n\n")]
    assert len(parts) > 1000 and len(parts) == len(set(parts))
    held_out = {part.strip() for part in heldout("manual").split("\n\n")}
    assert len(held_out) > 50 and not held_out.intersection(parts)


def test_a_python_without_the_text_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MissingDependencyError, match="pydoc_data"):
        manual_text()


def test_without_transformers_nothing_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    work = workspace(tmp_path)
    assert train_adapter(work) == (None, [])
    assert len(work.notes) == 1 and "loraformat[demo]" in work.notes[0]
    assert not list(tmp_path.iterdir())


def test_without_xllamacpp_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporting.llama_cpp, "is_installed", lambda: False)
    work = workspace(tmp_path)
    assert compare_with_llama_cpp(work) == []
    assert len(work.notes) == 1 and "loraformat[demo]" in work.notes[0]


def test_text_that_stands_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "manual.txt").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        train_adapter(workspace(tmp_path))
    assert (tmp_path / "manual.txt").read_text() == "mine"


def test_the_report_does_without_a_training(tmp_path: Path) -> None:
    from loraformat.demo.bases import Bases

    report = DemoReport(Bases())
    assert _training(report) == []
    assert report.to_dict()["training"] is None and report.to_dict()["llama_cpp"] == []


def test_llama_cpps_refusal_names_the_file(tmp_path: Path) -> None:
    assert llama_cpp.is_installed()
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(20))
    question = Question("x", [0], [0], 1, vocabulary=8, ordinary=3)
    with pytest.raises(LoraFormatError, match=r"no\.gguf.*llama\.cpp failed") as caught:
        ask(tmp_path / "no.gguf", question)
    print(caught.value)
