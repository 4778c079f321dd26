"""Adapters from strangers: refused by name, at once, without running or reading what they say."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraformat.errors import InputError, LoraFormatError, UnsupportedError
from loraformat.ops.adapter_output.output import write_adapter
from loraformat.ops.opening.adapter import open_adapter
from tests.adapters.peft_models import llama, trained

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
STATISTICS = "activation_statistics.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return trained(llama, {"target_modules": ["q_proj", "v_proj"]}, folder)[1]


@pytest.fixture
def plain(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "plain")


def change(path: Path, edit) -> None:
    tensors = load_file(path / WEIGHTS)
    edit(tensors)
    save_file(tensors, path / WEIGHTS)


def set_config(path: Path, **fields: object) -> None:
    file = path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def write_header(path: Path, header: str, data: bytes = b"") -> None:
    raw = header.encode()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(name: str, shape: list[int], begin: int, end: int) -> str:
    return f'"{name}":{{"dtype":"F32","shape":{json.dumps(shape)},"data_offsets":[{begin},{end}]}}'


def test_truncated_files_at_every_length(plain: Path) -> None:
    whole = (plain / WEIGHTS).read_bytes()
    for length in (0, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (plain / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(InputError):
            open_adapter(plain)


def test_truncated_config(plain: Path) -> None:
    text = (plain / CONFIG).read_text()
    for length in (0, 1, len(text) // 2, len(text) - 2):
        (plain / CONFIG).write_text(text[:length])
        with pytest.raises(InputError, match="JSON"):
            open_adapter(plain)


def test_shapes_that_no_memory_holds(plain: Path) -> None:
    write_header(plain, "{" + entry("m.q.lora_A.weight", [1 << 40, 1 << 40], 0, 8) + "}", b"0" * 8)
    with pytest.raises(InputError):
        open_adapter(plain)


def test_two_tensors_of_one_name(plain: Path) -> None:
    a, b = entry("q.lora_A.weight", [1, 2], 0, 8), entry("q.lora_B.weight", [2, 1], 8, 16)
    write_header(plain, "{" + f"{a},{a},{b}" + "}", bytes(16))
    with pytest.raises(InputError, match=r"twice|duplicate"):
        open_adapter(plain)


def test_two_spellings_of_one_tensor(plain: Path) -> None:
    def again(tensors) -> None:
        tensors.update({k.replace("_A.", "_A.default."): v.clone() for k, v in [*tensors.items()]})

    change(plain, again)
    with pytest.raises(InputError, match="occurs twice"):
        open_adapter(plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_named_and_nothing_is_written(plain: Path, tmp_path: Path, value) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    change(plain, lambda t: t[name].view(-1)[3].fill_(value))
    with open_adapter(plain) as adapter, pytest.raises(InputError, match=r"layers\.1.*v_proj.*NaN"):
        write_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_a_pair_names_the_nearest(plain: Path) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    change(plain, lambda t: t.update({name.replace("v_proj", "v_prj"): t.pop(name)}))
    with pytest.raises(InputError, match=r"v_pro?j has no lora_[AB]; the nearest is .*v_pro?j"):
        open_adapter(plain)


def test_a_and_b_of_other_ranks(plain: Path) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    change(plain, lambda t: t.update({name: torch.zeros(5, 32)}))
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.v_proj: A \[5, 32\]"):
        open_adapter(plain)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", r"(\w+\.?)+!", "((a|b|_)*)*c" * 20])
def test_patterns_that_would_take_for_ever(plain: Path, pattern: str) -> None:
    set_config(plain, alpha_pattern={pattern: 99}, rank_pattern={pattern: 3})
    with open_adapter(plain) as adapter:
        assert all(delta.alpha == 10 for delta in adapter.deltas.values())


@pytest.mark.parametrize(
    "patterns",
    [{"(": 1}, {r"(q)\1": 1}, {"(?=q)": 1}, {"q": None}, {"q": "4"}, ["q"], "q"],
)
def test_patterns_that_are_none(plain: Path, patterns) -> None:
    set_config(plain, alpha_pattern=patterns)
    with pytest.raises(InputError):
        open_adapter(plain)


class _Program:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_with_a_program_is_refused_and_not_run(
    plain: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (plain / WEIGHTS).unlink()
    torch.save({"x.lora_A.weight": _Program()}, plain / PICKLE)
    with pytest.raises(UnsupportedError, match="--allow-pickle"):
        open_adapter(plain)
    with pytest.raises(InputError, match="restricted loader"):
        open_adapter(plain, allow_pickle=True)
    (plain / PICKLE).write_bytes(pickle.dumps({"x": _Program()}))
    with pytest.raises(InputError, match="not a torch archive"):
        open_adapter(plain, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(1 << 20, 1 << 20),
        torch.zeros(1).as_strided((1 << 30,), (0,)),
        torch.eye(3).to_sparse(),
        torch.zeros(2, device="meta"),
        "text",
    ],
    ids=["expanded", "strided", "sparse", "meta", "text"],
)
def test_a_pickle_of_odd_tensors_is_refused(plain: Path, value) -> None:
    (plain / WEIGHTS).unlink()
    torch.save({"x.lora_A.weight": value}, plain / PICKLE)
    with pytest.raises(
        InputError, match=r"larger than the file|not a numeric tensor|restricted loader"
    ):
        open_adapter(plain, allow_pickle=True)


def test_a_pickle_that_unpacks_to_more_is_refused(plain: Path) -> None:
    (plain / WEIGHTS).unlink()
    with zipfile.ZipFile(plain / PICKLE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(InputError, match="compressed"):
        open_adapter(plain, allow_pickle=True)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, STATISTICS])
def test_links_that_lead_out(plain: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    shutil.copy(plain / (name if name != STATISTICS else WEIGHTS), outside)
    (plain / name).unlink(missing_ok=True)
    (plain / name).symlink_to(outside)
    with pytest.raises(InputError, match="leads out"):
        open_adapter(plain)


def test_an_index_that_leads_out(plain: Path, tmp_path: Path) -> None:
    (plain / WEIGHTS).rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"x.lora_A.weight": "../outside.safetensors"}}
    (plain / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="bare"):
        open_adapter(plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_parameters": 7},
        {"target_parameters": [7]},
        {"target_parameters": "experts.down_proj"},
        {"trainable_token_indices": [1, 2]},
        {"peft_version": ["0.19"], "r": "4"},
        {"peft_type": None},
        {"peft_type": ["LORA"]},
    ],
    ids=str,
)
def test_fields_of_another_kind(plain: Path, fields) -> None:
    set_config(plain, **fields)
    with pytest.raises(InputError):
        open_adapter(plain)


@pytest.mark.parametrize(
    "indices", [[1, 1], [1, -2], [1, 2, 3], [True, 2], {"embed": [1, 2]}, None, "12"], ids=str
)
def test_rows_that_do_not_fit_their_tokens(plain: Path, indices) -> None:
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    change(plain, lambda t: t.update({name: torch.zeros(2, 32)}))
    set_config(plain, trainable_token_indices=indices)
    with pytest.raises(InputError):
        open_adapter(plain)


def symmetric(rank: int) -> torch.Tensor:
    z = torch.randn(64, rank, generator=torch.Generator().manual_seed(3))
    return (z.T @ z / 64).contiguous()


@pytest.mark.parametrize(
    ("name", "moment", "words"),
    [
        ("q_proj", symmetric(3), "wanted F32 of"),
        ("q_proj", symmetric(4).half(), "F16"),
        ("q_prj", symmetric(4), "the nearest is .*q_proj"),
        ("q_proj", symmetric(4) * float("nan"), "not finite"),
        ("q_proj", symmetric(4).triu(), "not symmetric"),
        ("q_proj", -symmetric(4), "negative"),
    ],
)
def test_statistics_that_are_none(plain: Path, name: str, moment, words: str) -> None:
    save_file({f"model.layers.0.self_attn.{name}.second_moment": moment}, plain / STATISTICS)

    def use() -> None:
        with open_adapter(plain) as adapter:
            for delta in adapter.deltas.values():
                if delta.second_moment is not None:
                    delta.second_moment.load()

    with pytest.raises(LoraFormatError, match=words):
        use()
