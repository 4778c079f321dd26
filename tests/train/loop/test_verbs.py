"""``train``, ``eval`` and ``generate`` on the command line, as processes where it matters."""

import json
import math
import re
import shlex
import shutil
import signal
import time

import pytest
import torch
import yaml

from loraformat.demo import SMALL_MODEL
from loraformat.ops.convert.convert import convert
from loraformat.train import LoraOptions, load
from loraformat.train.loop.metrics import read_metrics
from tests.train.loop.tiny_runs import files_of

QUICK = [
    "--rank", 4, "--alpha", 8, "--seq-len", 48, "--grad-accum", 2, "--epochs", 2, "--lr", "5e-3",
    "--dropout", 0.1, "--no-plot",
]  # fmt: skip


@pytest.fixture
def call(place, tmp_path):
    """The arguments of a tiny run."""
    return ["train", place / "bundle", place / "data.jsonl", "-o", tmp_path / "a", *QUICK]


def test_train(run, call, tmp_path):
    result = run(*call)
    assert result.code == 0
    assert re.match(r"wrote \S+/a: \d+ steps, [\d,]+ tokens, .* s, loss 7\.\d+ to ", result.out)
    assert f"record: {tmp_path / 'a.run'}" in result.out
    assert "data: 40 rows, 40 samples" in result.err
    assert "⟦" in result.err
    assert "memory at most about" in result.err
    config = yaml.safe_load((tmp_path / "a.run" / "run.yaml").read_text())
    assert (config["rank"], config["lr"], config["grad-accum"]) == (4, 5e-3, 2)


def test_train_json_and_quiet(run, call):
    result = run(*call, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    members = json.loads(result.out)
    assert (members["schema"], members["schema_version"]) == ("loraformat.train", 1)
    assert members["training"]["steps"] == members["steps"]
    assert members["memory"]["total"] > members["memory"]["adapter"]
    result = run(*call, "--quiet", "--force")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_the_written_config_is_the_run(run, call, tmp_path):
    assert run(*call).code == 0
    config = tmp_path / "a.run" / "run.yaml"
    result = run("train", "--config", config, "-o", tmp_path / "b", "--quiet")
    assert (result.code, result.err) == (0, "")
    one, other = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert one["adapter_model.safetensors"] == other["adapter_model.safetensors"]
    result = run("train", "--config", config, "-o", tmp_path / "c", "--steps", 1, "--json")
    assert json.loads(result.out)["steps"] == 1


def test_notes_come_before_the_run(run, call, tmp_path):
    """What an adapter that is trained on leaves unheeded, for one."""
    assert run(*call, "--quiet").code == 0
    result = run(*call, "-o", tmp_path / "b", "--adapter", tmp_path / "a")
    assert result.code == 0
    told = "note: --rank, --alpha: ignored, because --adapter has its own"
    assert result.err.index(told) < result.err.index("a sample, with target tokens")
    assert told not in result.out
    assert told in run(*call, "-o", tmp_path / "c", "--adapter", tmp_path / "a", "--dry-run").out


@pytest.mark.parametrize("verb", ["train", "train from YAML", "eval", "generate"])
def test_an_adapter_of_another_base_is_refused_unless_allowed(verb, run, place, tmp_path):
    with load(place / "bundle", lora=LoraOptions(rank=4)) as model:
        model.save_adapter(tmp_path / "a")
    convert(place / "stored", tmp_path / "other", block_size=128)
    words = {"train": [tmp_path / "other", place / "data.jsonl", "-o", tmp_path / "b", *QUICK],
             "eval": [tmp_path / "other", place / "data.jsonl", "--seq-len", 48],
             "generate": [tmp_path / "other", "--prompt", "moon", "--max-tokens", 1]}  # fmt: skip
    call = [verb.split()[0], *words[verb.split()[0]], "--adapter", tmp_path / "a"]
    result = run(*call)
    assert result.code == 3
    assert "was made for the base" in result.err
    assert "override with --allow-base-mismatch" in result.err
    if verb == "train from YAML":
        (tmp_path / "run.yaml").write_text("allow-base-mismatch: true\nsteps: 1\n")
        result = run(*call, "--config", tmp_path / "run.yaml")
    else:
        result = run(*call, "--allow-base-mismatch", *(["--steps", 1] if verb == "train" else []))
    assert result.code == 0
    assert "it may not work on this base" in result.out + result.err


def test_dry_run(run, call, tmp_path):
    result = run(*call, "--dry-run")
    assert (result.code, result.err) == (0, "")
    assert "memory at most about" in result.out
    assert re.search(
        r"time: about .* s; a micro-batch of \d+ tokens takes .* s \(timed\)", result.out
    )
    assert list(tmp_path.iterdir()) == []
    members = json.loads(run(*call, "--dry-run", "--json").out)
    assert members["dry_run"]
    assert members["time"]["measured"] == "batch"
    result = run(*call, "--dry-run", "--max-memory", "50MB")
    assert result.code == 6
    assert "50.0 MB are allowed" in result.err


def test_ctrl_c_and_the_command_that_it_names(start, call, tmp_path, place):
    """P7 in processes: interrupted, gone on with the printed words, and the same bytes."""
    environment = {"OMP_NUM_THREADS": "1"}
    words = ["-m", "loraformat", *call, "--epochs", 12]
    first = start(*words, env=environment)
    record = tmp_path / "a.run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (record.exists() and record.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130
    said = re.search(r"To continue, run: loraformat (.*)\n", err)
    assert said[1].endswith("--resume")
    assert not (tmp_path / "a").exists()
    second = start("-m", "loraformat", *shlex.split(said[1]), env=environment)
    assert second.communicate(timeout=100)[1].count("Traceback") == 0
    assert second.returncode == 0
    whole = start(*words, "-o", tmp_path / "whole", env=environment)
    whole.communicate(timeout=100)
    one, other = files_of(tmp_path / "a"), files_of(tmp_path / "whole")
    assert one["adapter_model.safetensors"] == other["adapter_model.safetensors"]
    statistics = "activation_statistics.safetensors"
    assert one[statistics] == other[statistics]
    kept = [read_metrics(tmp_path / f"{name}.run" / "metrics.jsonl") for name in ("a", "whole")]
    assert [line["loss"] for line in kept[0]] == [line["loss"] for line in kept[1]]


@pytest.mark.parametrize(
    ("processes", "here", "program"),
    [
        (None, None, "loraformat"),
        ("2", "2", "torchrun --nproc-per-node 2 -m loraformat"),
        ("8", "4", "torchrun --nnodes 2 --nproc-per-node 4 -m loraformat"),
    ],
)
def test_the_command_starts_as_many_processes(
    run, call, monkeypatch, tmp_path, processes, here, program
):
    def interrupted(*arguments, **options):
        if processes is not None:
            monkeypatch.setenv("WORLD_SIZE", processes)
            monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        raise KeyboardInterrupt

    monkeypatch.setattr("loraformat.train.run.train.train", interrupted)
    result = run(*call)
    assert result.code == 130
    words = shlex.join(map(str, call))
    assert f"To continue, run: {program} {words} --resume" in result.err


def test_resume_needs_only_the_output(run, call, tmp_path):
    first = run(*call)
    assert first.code == 0
    result = run("train", "-o", tmp_path / "a", "--resume")
    assert result.code == 0
    told = f"{tmp_path / 'a'} was already complete; nothing was done: "
    assert result.out == first.out.replace(f"wrote {tmp_path / 'a'}: ", told)
    members = json.loads(run("train", "-o", tmp_path / "a", "--resume", "--json", "-q").out)
    assert members["was_complete"]
    shutil.rmtree(tmp_path / "a")  # what is missing is written from the last checkpoint
    result = run("train", "-o", tmp_path / "a", "--resume")
    assert result.out == first.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train"], 2, "no base given"),
        (["train", "-o", "a", "--resume"], 3, "a.run: contains no run to resume"),
        (["train", "BUNDLE"], 2, "no output given"),
        (["train", "BUNDLE", "-o", "a"], 2, "no training data given"),
        (["train", "BUNDLE", "DATA", "-o", "a", "--targets", "q_prj"], 2, "q_proj"),
        (["train", "BUNDLE", "DATA", "-o", "a", "--rank", "0"], 2, "rank is 0"),
        (["train", "BUNDLE", "DATA", "-o", "a", "--lr", "0"], 2, "lr is 0.0"),
        (["train", "BUNDLE", "DATA", "-o", "a", "--ranks", "q"], 2, "GLOB=RANK"),
        (["train", "BUNDLE", "DATA", "-o", "a", "--batch-size", "0"], 2, "batch-size is 0"),
        (["train", "BUNDLE", "DATA", "-o", "a", "--seq-len", "0"], 2, "seq-len is 0, wanted"),
        (["train", "BUNDLE", "DATA", "-o", "a", "--seq-len", "999"], 2, "takes 128 tokens"),
        (["train", "BUNDLE", "DATA", "-o", "a", "--device", "gpu"], 2, "wanted cpu, cuda"),
        (
            ["train", "BUNDLE", "DATA", "-o", "a", "--optimizer", "paged-adamw-8bit"],
            2,
            "use --optimizer-states disk",
        ),
        (["train", "BUNDLE", "DATA", "-o", "a", "--device-memory", "1GB"], 2, "--max-memory"),
        (["train", "BUNDLE", "nowhere.jsonl", "-o", "a"], 3, "nowhere.jsonl"),
        (
            ["train", "BUNDLE", "DATA", "-o", "a", "--subset", "en"],
            2,
            "subset is 'en', and the data are files, which have none; leave --subset out",
        ),
        (["train", "BUNDLE", "DATA", "-o", "a", "--split", "test"], 2, "leave --split out"),
        (["eval", "BUNDLE", "DATA", "--subset", "en"], 2, "leave --subset out"),
        (["train", "nowhere", "DATA", "-o", "a"], 3, "no such file"),
        (["train", "SMALL", "DATA", "-o", "a"], 3, "loraformat convert"),
        (["train", "--config", "nowhere.yaml"], 3, "nowhere.yaml: cannot be read"),
        (["train", "BUNDLE", "DATA", "-o", "BUNDLE"], 5, "is or contains the input"),
        (["train", "BUNDLE", "DATA", "-o", "no/where"], 5, "no such directory"),
        (["train", "BUNDLE", "DATA", "-o", "a", "--device", "cuda:7"], 6, "no GPU cuda:7"),
        (["eval", "BUNDLE", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["eval", "DATA", "DATA"], 3, "give the base first, then the data"),
        (["eval", "BUNDLE", "DATA", "--adapter", "nowhere"], 3, "nowhere"),
        (["generate", "BUNDLE", "--prompt", "x", "--chat"], 2, "no chat template"),
        (["generate", "BUNDLE", "--prompt", "x", "--top-p", "0"], 2, "top-p is 0"),
        (["generate", "BUNDLE", "--prompt", "x", "--system", "y"], 2, "add --chat"),
        (["generate", "BUNDLE", "--prompt", "bell " * 200], 3, "the model takes 128"),
    ],
)
def test_errors(run, place, tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    if torch.cuda.device_count() > 7:
        pytest.fail("this machine has the GPU that the test says is not there")
    names = {"BUNDLE": place / "bundle", "DATA": place / "data.jsonl", "SMALL": SMALL_MODEL}
    result = run(*(names.get(argument, argument) for argument in arguments))
    assert result.code == code, result.err
    assert said in result.err.splitlines()[-1]
    assert result.out == ""
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_eval_says_what_nf4_cost(run, place, tmp_path):
    convert(place / "bundle", tmp_path / "back.gguf", dtype="f32")
    losses = {}
    for base in (place / "bundle", tmp_path / "back.gguf", SMALL_MODEL):
        told = json.loads(run("eval", base, place / "data.jsonl", "--json").out)
        losses[base.name] = told["results"][0]["loss"]
    assert losses["back.gguf"] == pytest.approx(losses["bundle"], rel=1e-5)
    assert losses["small_model"] < losses["bundle"] - 1e-3
    texts = [
        run("generate", base, "--prompt", "import ", "--max-tokens", "6", "--temperature", "0").out
        for base in (place / "bundle", tmp_path / "back.gguf")
    ]
    assert texts[0] == texts[1] and texts[0].strip()


def test_a_template_that_refuses_is_no_traceback(run, place, tmp_path):
    shutil.copytree(place / "dense", tmp_path / "dense")
    path = tmp_path / "dense" / "tokenizer_config.json"
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no \x1b system') }}{% endif %}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template + "bell"}))
    assert run("convert", tmp_path / "dense", tmp_path / "b").code == 0
    words = ["generate", tmp_path / "b", "--prompt", "x", "--chat", "--max-tokens", "1"]
    assert run(*words).code == 0
    result = run(*words, "--system", "y")
    assert result.code == 3
    assert "its chat template rejects the prompt: no \\x1b system; try" in result.err


# eval


def test_eval_is_the_loss_of_transformers(run, place):
    """On the dense float32 model of the stored weights, row by row."""
    from loraformat.train.data.dataset import open_data
    from loraformat.train.data.options import DataOptions
    from tests.train.tiny_bundles import stored_model

    members = json.loads(
        run("eval", place / "bundle", place / "held.jsonl", "--seq-len", 48, "--json", "-q").out
    )
    model = stored_model(place / "bundle")
    total = count = 0
    options = DataOptions(seq_len=48, packing=False)
    for batch, _ in open_data(place / "held.jsonl", place / "bundle", options).batches(epochs=1):
        with torch.no_grad():
            mean = float(model(batch.input_ids, labels=batch.labels).loss)
        total, count = total + mean * batch.trained, count + batch.trained
    (found,) = members["results"]
    assert found["tokens"] == count
    assert found["adapter"] is None
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_eval_shows_base_beside_adapter(run, call, place, tmp_path):
    held = ["--eval", place / "held.jsonl", "--json", "--quiet"]
    trained = json.loads(run(*call, *held).out)["training"]
    result = run("eval", place / "bundle", place / "held.jsonl", "--adapter", tmp_path / "a",
                 "--seq-len", 48)  # fmt: skip
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines()]
    assert rows[0] == ["model", "loss", "perplexity", "loss", "change"]
    assert (rows[1][0], rows[2][0]) == ("bundle", "a")
    assert float(rows[1][1]) == pytest.approx(trained["heldout_before"], abs=1e-3)
    assert float(rows[2][1]) == pytest.approx(trained["heldout_after"], abs=1e-3)
    assert float(rows[2][3]) == pytest.approx(float(rows[2][1]) - float(rows[1][1]), abs=2e-4)
    assert float(rows[2][3]) < 0


# generate


def test_generate_is_that_of_transformers(run, place):
    from loraformat.train.data.tokenizer import open_tokenizer
    from tests.train.tiny_bundles import stored_model

    result = run("generate", place / "bundle", "--prompt", "bell book", "--temperature", 0,
                 "--max-tokens", 20)  # fmt: skip
    encoder = open_tokenizer(place / "bundle")
    ids = torch.tensor([[*encoder.prefix, *encoder.tokenize("bell book").ids]])
    theirs = stored_model(place / "bundle").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False,
        eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    text = encoder.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    assert result.code == 0
    assert result.out == text + "\n"
    assert re.match(r"\d+ tokens, [\d.]+ per second", result.err)


def test_generate_draws_by_the_seed(run, place):
    def text(*more):
        result = run("generate", place / "bundle", "--prompt", "bell", "--max-tokens", 12,
                     "--temperature", 1.5, "--json", *more)  # fmt: skip
        members = json.loads(result.out)
        assert members["schema"] == "loraformat.generate"
        assert members["tokens"] <= 12
        return members["text"]

    assert text() == text("--seed", 0)
    assert text("--seed", 1) != text("--seed", 2)


def test_generate_with_an_adapter(run, place, tmp_path):
    """After it has learned two rows by heart it says them, and ends."""
    lines = (place / "data.jsonl").read_text().splitlines()
    (tmp_path / "two.jsonl").write_text("\n".join(lines[:2]))
    result = run("train", place / "bundle", tmp_path / "two.jsonl", "-o", tmp_path / "a", "--steps",
                 60, "--grad-accum", 1, "--lr", "3e-2", "--no-plot", "-q")  # fmt: skip
    assert result.code == 0, result.err
    first = json.loads(lines[0])
    ask = ["generate", place / "bundle", "--prompt", first["prompt"], "--temperature", 0,
           "--max-tokens", 40, "--json"]  # fmt: skip
    without = json.loads(run(*ask).out)
    having = json.loads(run(*ask, "--adapter", tmp_path / "a").out)
    assert having["text"] == first["completion"]
    assert without["text"] != first["completion"]
