"""Arguments of the public functions: one or several, sizes, progress."""

import pytest

import loraformat
from loraformat.demo import ADAPTERS, SMALL_MODEL
from loraformat.errors import UsageError
from loraformat.ops.arguments import byte_count, many, reported
from loraformat.train.run.options import options_of

MANUAL = ADAPTERS["manual"]


@pytest.mark.parametrize("path", [str, lambda path: path], ids=["text", "path"])
def test_one_path_is_not_read_letter_by_letter(tmp_path, path):
    adapter = path(MANUAL)
    combined = loraformat.combine(adapter, tmp_path / "one", dry_run=True)
    assert combined.sources == [str(MANUAL)]
    merged = loraformat.merge(path(SMALL_MODEL), adapter, tmp_path / "m", weight=0.5, dry_run=True)
    assert [(a.path, a.weight) for a in merged.adapters] == [(str(MANUAL), 0.5)]
    checked = loraformat.check(adapter, runtime="vllm")
    assert list(checked.verdicts) == ["vllm"]
    report = loraformat.convert(
        SMALL_MODEL, tmp_path / "b", skip="*", max_shard_size="1MB", dry_run=True
    )
    assert report.quantized == 0


def test_values_and_their_lists_are_the_same(tmp_path):
    one = loraformat.combine([MANUAL], tmp_path / "a", weight=[0.5], dry_run=True)
    other = loraformat.combine(MANUAL, tmp_path / "a", weight=0.5, dry_run=True)
    assert one.to_dict() | {"seconds": 0} == other.to_dict() | {"seconds": 0}


def test_options_of_a_run():
    options = options_of(
        {"base": SMALL_MODEL, "data": "rows.jsonl", "output": "out", "targets": "q_proj, v_proj",
         "ranks": {"q_proj": 4}, "max_memory": "4GB", "eval": ["a", "b"], "original": None,
         "resume": True}
    )  # fmt: skip
    assert (options.base, options.data, options.eval) == (
        str(SMALL_MODEL),
        ("rows.jsonl",),
        ("a", "b"),
    )
    assert (options.targets, options.ranks) == (("q_proj", "v_proj"), (("q_proj", 4),))
    assert (options.max_memory, options.original, options.rank) == (4_000_000_000, "", 16)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("optimizer", "adam", "optimizer is 'adam', wanted one of adamw"),
        ("compute_dtype", "f64", "compute-dtype is 'f64', wanted one of auto"),
        ("max_memory", "much", "max-memory: 'much' is not a size"),
    ],
)
def test_words_that_no_option_has(name, value, said):
    with pytest.raises(UsageError, match=said):
        options_of({name: value})


@pytest.mark.parametrize("size", ["much", 0, -1, True])
def test_what_is_no_size(size):
    with pytest.raises(UsageError, match="max-shard-size"):
        byte_count(size, "max-shard-size")


def test_many():
    assert many("ab") == ("ab",) and many(MANUAL) == (MANUAL,) and many(0.5) == (0.5,)
    assert many(["a", "b"]) == many(x for x in "ab") == ("a", "b") and many(()) == ()


def test_progress_is_told_or_drawn(capsys):
    told = []
    with reported(lambda done, total: told.append((done, total)), "x") as tell:
        tell(1, 2)
    with reported(False, "x") as tell:
        tell(1, 2)
    assert (told, capsys.readouterr().err) == ([(1, 2)], "")


def test_a_bar_is_on_stderr(capsys, monkeypatch):
    import tqdm

    monkeypatch.setattr(tqdm.tqdm, "__init__", _at_once(tqdm.tqdm.__init__))
    report = loraformat.spectrum(MANUAL, progress=True)
    out, err = capsys.readouterr()
    assert report.modules and out == "" and "spectrum: 100%" in err


def _at_once(made):
    def init(self, *words, **options):
        made(self, *words, **options | {"delay": 0, "mininterval": 0})

    return init


def test_a_system_message_needs_a_chat():
    with pytest.raises(UsageError, match="--system needs --chat"):
        loraformat.generate(SMALL_MODEL, "Once", system="Be brief.")


def test_a_picture_of_an_adapters_errors_is_refused(tmp_path):
    with pytest.raises(UsageError, match="loraformat spectrum"):
        loraformat.plot_errors(loraformat.info(MANUAL), tmp_path / "errors.png")


def test_a_loss_curve_needs_a_run(tmp_path):
    with pytest.raises(loraformat.LoraFormatError, match="holds no record of a run"):
        loraformat.plot_loss(tmp_path / "adapter", tmp_path / "loss.png")
