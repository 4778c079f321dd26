"""One table of options: the command line, YAML and Python agree."""

import json
from dataclasses import fields

import click
import pytest
import yaml

from loraformat.cli.train import command
from loraformat.cli.train_options import given_settings
from loraformat.errors import InputError, UsageError
from loraformat.train.data.options import DataOptions
from loraformat.train.loop.optimizer_options import OptimizerOptions
from loraformat.train.lora.options import LoraOptions
from loraformat.train.run import config_file
from loraformat.train.run.options import SETTINGS, TrainOptions, options_of
from loraformat.train.run.run_directory import check_same, identity_of

ALL = {
    "base": "b", "data": ["x.jsonl", "y"], "output": "o", "rank": 4, "alpha": 8, "rslora": True,
    "targets": "q_proj, mlp", "ranks": {"*down_proj": 2}, "dropout": 0.1, "init": "gaussian",
    "original": "m", "dora": True, "embeddings": True, "head": True, "statistics": False,
    "adapter": "a", "allow-base-mismatch": True, "seq-len": 64, "batch-size": 2, "train-on": "all",
    "over-length": "drop",
    "packing": False, "shuffle": False, "bad-rows": "skip", "split-text": "paragraphs",
    "chat-template": "t.jinja", "subset": "s", "split": "test", "epochs": 3, "steps": 7,
    "grad-accum": 2, "layer-major": True, "lr": "1e-3", "schedule": "linear", "warmup": 5,
    "lora-plus": 16, "weight-decay": 0.01, "clip": 0.3, "optimizer": "sgd",
    "optimizer-states": "memory", "seed": 3, "deterministic": True, "eval": ["h.jsonl"],
    "eval-every": 5, "early-stop": 2, "best": True, "prompt": ["Once"], "save-every": 2,
    "keep": 1, "tensorboard": True, "plot": False, "device": "cuda:1", "compute-dtype": "bf16",
    "device-memory": "4GB", "activation-memory": 500000, "max-memory": 1000000,
}  # fmt: skip


def write(path, text):
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return path


def from_flags(*arguments):
    """What the command line makes of its arguments."""
    context = command.make_context("train", list(arguments))
    given = dict(context.params)
    config = given.pop("config")
    for other in ("resume", "force", "dry_run", "as_json", "quiet"):
        given.pop(other)
    return options_of(given_settings(given, config))


def test_every_option_is_in_yaml(tmp_path):
    assert set(ALL) == {setting.flag for setting in SETTINGS}
    options = TrainOptions(**config_file.read(write(tmp_path / "run.yaml", ALL)))
    assert (options.lr, options.alpha, options.device_memory) == (1e-3, 8.0, 4 * 10**9)
    assert options.targets == ("q_proj", "mlp")
    unset = {"optimizer_states"}  # whose other word needs another optimizer
    for setting in SETTINGS:
        if setting.name not in unset:
            assert getattr(options, setting.name) != setting.default, setting.name


def test_what_is_written_is_what_was_read(tmp_path):
    first = TrainOptions(**config_file.read(write(tmp_path / "a.yaml", ALL)))
    text = config_file.dump(first.to_json())
    assert TrainOptions(**config_file.read(write(tmp_path / "b.yaml", text))) == first
    text = config_file.dump(TrainOptions().to_json())
    assert TrainOptions(**config_file.read(write(tmp_path / "c.yaml", text))) == TrainOptions()
    emptied = TrainOptions(targets=(), embeddings=True, split="")  # and not by default
    text = config_file.dump(emptied.to_json())
    assert TrainOptions(**config_file.read(write(tmp_path / "d.yaml", text))) == emptied


def test_every_option_has_a_flag():
    flags = {flag for parameter in command.params for flag in parameter.opts}
    run = {setting.flag for setting in SETTINGS if setting.section == "run"}
    assert {f"--{setting.flag}" for setting in SETTINGS if setting.flag not in run} <= flags


def test_flags_give_what_yaml_gives(tmp_path):
    arguments = ["b", "x.jsonl", "y"]
    for flag, value in ALL.items():
        setting = next(one for one in SETTINGS if one.flag == flag)
        if flag in ("base", "data"):
            continue
        if setting.kind == "flag":
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif setting.kind == "ranks":
            arguments += [f"--{flag}", "*down_proj=2"]
        else:
            for one in value if isinstance(value, list) else [value]:
                arguments += [f"--{flag}", str(one)]
    expected = TrainOptions(**config_file.read(write(tmp_path / "run.yaml", ALL)))
    assert from_flags(*arguments) == expected


def test_flags_override_yaml(tmp_path):
    path = write(tmp_path / "run.yaml", {"rank": 4, "packing": False, "targets": ["mlp"], "lr": 1})
    options = from_flags("--config", str(path), "--rank", "2", "--packing", "--targets", "q,k")
    assert (options.rank, options.packing, options.targets, options.lr) == (2, True, ("q", "k"), 1)
    assert from_flags("b") == TrainOptions(base="b")


def test_defaults_are_those_of_the_parts():
    options = TrainOptions()
    assert options.lora() == LoraOptions()
    assert options.data_options() == DataOptions()
    assert options.optimizer_options() == OptimizerOptions()


def test_help_shows_the_defaults():
    with click.Context(command, info_name="train") as context:
        text = " ".join(command.get_help(context).split())
    for words in ("--rank R Rank of every module. [default: 16]", "[default: all-linear]",
                  "[default: cosine]", "[default: 0.0002]", "[default: no-dora]"):  # fmt: skip
        assert words in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnak: 4", "has no option 'rnak'; did you mean 'rank'?"),
        ("seqlen: 4", "did you mean 'seq-len'?"),
        ("xyzzy: 4", "has no option 'xyzzy'"),
        ("rank: 4\nrank: 8", "has 'rank' twice"),
        ("seq-len: 4\nseq_len: 8", "twice"),
        ("rank: four", "option rank is 'four', wanted a whole number"),
        ("rank: true", "option rank is True, wanted a whole number"),
        ("lr: fast", "option lr is 'fast', wanted a number"),
        ("lr: .nan", "option lr is nan, wanted a number"),
        ("packing: 1", "option packing is 1, wanted true or false"),
        ("schedule: step", "option schedule is 'step', wanted cosine or linear or constant"),
        ("max-memory: much", "option max-memory is 'much', wanted a size such as 4GB"),
        ("ranks: 4", "option ranks is 4, wanted a mapping of names to ranks"),
        ("data: [1]", "option data is [1], wanted a text or a list of texts"),
        ("- rank", "is not a mapping"),
        ("rank: [", "is no YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is no YAML"),
        ("? {a: 1}\n: 2", "is no YAML"),
    ],
)
def test_yaml_is_refused(tmp_path, text, said):
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(InputError) as caught:
        config_file.read(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_yaml_that_is_none(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        config_file.read(tmp_path / "nowhere.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is no YAML"):
        config_file.read(tmp_path / "binary")
    (tmp_path / "long").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(InputError, match="longer"):
        config_file.read(tmp_path / "long")
    assert config_file.read(write(tmp_path / "empty", "")) == {}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "epochs is 0, wanted at least 1"),
        ({"steps": 0}, "steps is 0"),
        ({"grad_accum": 0}, "grad-accum is 0"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"lora_plus": 0.5}, "lora-plus is 0.5"),
        ({"eval_every": 5}, "name them with --eval"),
        ({"best": True}, "name them with --eval"),
        ({"eval": ("x",), "early_stop": 2}, "early-stop needs eval-every"),
    ],
)
def test_options_that_make_no_sense(wrong, said):
    with pytest.raises(UsageError) as caught:
        TrainOptions(**wrong)
    assert said in str(caught.value)


def identity(**changed):
    other = {name: changed.pop(name) for name in list(changed) if name in ("base", "ranks", "data")}
    members = {
        "base": "f",
        "data": "d",
        "held_out": None,
        "ranks": 1,
        "steps": 4,
        "compute": "cpu, float32",
        **other,
    }
    return identity_of(TrainOptions(**changed), **members)


def test_another_run_is_named():
    before = json.loads(json.dumps(identity()))
    check_same(before, identity())
    check_same(before, identity(keep=5, save_every=1, optimizer_states="disk", max_memory=10**9))
    for changed, said in (
        ({"lr": 1e-3}, "--lr was 0.0002 and is 0.001"),
        ({"ranks": 2}, "the number of processes was 1 and is 2"),
        ({"data": "other"}, "the data's fingerprint was d and is other"),
        ({"base": "g" * 64}, "the base's fingerprint was f and is gggggggggggg…"),
        ({"seq_len": 256, "rank": 4}, "--rank was 16 and is 4, --seq-len was None and is 256"),
    ):
        with pytest.raises(UsageError) as caught:
            check_same(before, identity(**changed))
        assert said in str(caught.value)


def test_what_does_not_change_the_result_is_free():
    free = {setting.name for setting in SETTINGS if setting.free}
    assert free == {
        "base", "data", "output", "optimizer_states", "eval", "prompt", "save_every", "keep",
        "tensorboard", "plot", "device_memory", "activation_memory", "max_memory",
        "allow_base_mismatch",
    }  # fmt: skip
    lora = {entry.name for entry in fields(LoraOptions)}
    assert not free & (lora | {entry.name for entry in fields(DataOptions)})


@pytest.mark.parametrize("value", ["!!bool x", "!!timestamp x", "!!int x", "*a"])
def test_yaml_that_cannot_be_read_is_refused(tmp_path, value):
    path = tmp_path / "run.yaml"
    path.write_text(f"rank: {value}\n")
    with pytest.raises(InputError, match="is no YAML"):
        config_file.read(path)
