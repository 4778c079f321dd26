"""What check says of adapters of another vocabulary, and whether what it advises works."""

import shlex

import pytest

from loraformat.cli import main
from loraformat.ops.check.check import check
from tests.adapters.vocabularies import FORMS, ROWS, adapter

SAVINGS = [None, {"save_embedding_layers": False}]


@pytest.mark.parametrize("saving", SAVINGS)
@pytest.mark.parametrize("form", ["saved by itself", "modules_to_save", "tokens", "both targeted"])
def test_the_merge_that_is_advised_works(tmp_path, monkeypatch, form, saving):
    assert form in FORMS
    adapter("llama", form, ROWS + 4, tmp_path, saving)
    monkeypatch.chdir(tmp_path)
    found = check("adapter", base="base").findings
    failing = {finding.runtime for finding in found if finding.level == "fail"}
    if form == "saved by itself" and saving:  # nothing in it says that there are more tokens
        assert not failing & {"transformers", "vllm", "llama.cpp"}
        return
    assert {"transformers", "vllm", "llama.cpp"} <= failing
    commands = {finding.command for finding in found if finding.runtime == "vllm"}
    if form == "tokens" and saving:
        assert commands == {None}
        assert any("resize_token_embeddings" in finding.remedy for finding in found)
        return
    (command,) = commands - {None}
    with pytest.raises(SystemExit) as done:
        main(shlex.split(command)[1:])
    assert done.value.code == 0
