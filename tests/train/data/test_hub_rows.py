"""Data sets through the package ``datasets``, from a directory in the place of the Hub."""

import sys

import datasets
import huggingface_hub
import pytest

from loraformat.errors import HubError, InputError, MissingDependencyError, UsageError
from loraformat.train.data import DataOptions, open_data
from loraformat.train.data.row_sources import HubRows, open_hub

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def repo(cache, write, tmp_path):
    write("repo/train.jsonl", [{"messages": MESSAGES, "id": i} for i in range(5)])
    write("repo/test.jsonl", [{"messages": MESSAGES, "id": 9}])
    return str(tmp_path / "repo")


def test_a_split_is_read_with_the_fields_that_mean_something(repo):
    rows = open_hub(repo, None, "", "train")
    assert (len(rows), rows.name, rows.place(4)) == (5, repo, "row 5")
    assert rows.read(4).fields == {"messages": MESSAGES}
    assert len(open_hub(repo, None, "", "test")) == 1


def test_the_same_samples_as_from_the_file(repo, chat, monkeypatch):
    from loraformat.train.data import row_sources

    monkeypatch.setattr(
        row_sources,
        "open_hub",
        lambda id_, revision, subset, split: open_hub(repo, None, "", split),
    )
    opened = open_data("org/name", chat, DataOptions(split="train"))
    again = open_data(f"{repo}/train.jsonl", chat)
    assert opened.fingerprint == again.fingerprint
    assert [b.input_ids.tolist() for b, _ in opened.batches(epochs=1)] == [
        b.input_ids.tolist() for b, _ in again.batches(epochs=1)
    ]


def test_null_columns_are_as_if_they_were_not_there(chat):
    table = datasets.Dataset.from_list([{"messages": MESSAGES, "tools": None, "text": None}])
    assert set(HubRows("org/name", table).read(0).fields) == {"messages"}
    from loraformat.train.data.row_formats import kind_of

    assert kind_of(HubRows("org/name", table).read(0).fields) == "messages"


def test_a_split_that_does_not_exist(repo):
    with pytest.raises(HubError, match=r"cannot be loaded from the Hub as a dataset: .*validation"):
        open_hub(repo, None, "", "validation")


def test_a_data_set_that_does_not_exist(cache, tokenizer):
    with pytest.raises(HubError, match="org/none: is not a local path and cannot be loaded"):
        open_data("org/none@main", tokenizer)


def test_columns_that_mean_nothing():
    table = datasets.Dataset.from_list([{"image": 1, "label": 2}])
    with pytest.raises(InputError, match="org/name: columns image, label; wanted some of"):
        HubRows("org/name", table)


def test_without_datasets(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'loraformat\[data\]'"):
        open_data("org/name", tokenizer)


@pytest.mark.parametrize("given", [{"subset": "en"}, {"split": "test"}])
def test_files_have_no_subset(write, chat, given):
    path = write("a.jsonl", [{"messages": MESSAGES}])
    (name,) = given
    for named in (path, path.parent, [path, path]):
        with pytest.raises(UsageError, match=f"{name} is .*, and the data are files"):
            open_data(named, chat, DataOptions(**given))
    with pytest.raises(InputError, match="no such file"):
        open_data([path, "nowhere.jsonl"], chat, DataOptions(**given))


def test_a_subset_is_meant_for_those_on_the_hub(write, chat, monkeypatch):
    from loraformat.train.data import row_sources
    from loraformat.train.run.options import TrainOptions
    from loraformat.train.run.setup import _settings

    seen = []

    def open_hub(repo, revision, subset, split):
        seen.append((subset, split))
        return HubRows(repo, datasets.Dataset.from_list([{"messages": MESSAGES}]))

    monkeypatch.setattr(row_sources, "open_hub", open_hub)
    path = str(write("a.jsonl", [{"messages": MESSAGES}]))
    opened = open_data([path, "org/name"], chat, DataOptions(subset="en"))
    assert (opened.audit.rows, seen) == (2, [("en", "train")])
    for data, held in ((path, "org/name"), ("org/name", path)):
        options = TrainOptions(data=(data,), eval=(held,), subset="en", split="test")
        for names in (options.data, options.eval):
            open_data(names, chat, _settings(options, names))
    assert seen[1:] == 2 * [("en", "test")]
    options = TrainOptions(data=(path,), eval=(path,), subset="en")
    with pytest.raises(UsageError, match="leave --subset out"):
        open_data(options.data, chat, _settings(options, options.data))
