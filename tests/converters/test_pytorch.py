"""``pytorch_model.bin``: read on request, as transformers reads it, and never run."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraformat import plugins
from loraformat.errors import FileChangedError, FormatError, InputError, UnsupportedError
from loraformat.ops.convert.convert import convert
from loraformat.ops.info.model import info
from loraformat.ops.merge.merge import merge
from loraformat.ops.opening.model import open_model
from loraformat.ops.verify import verify
from loraformat.tensors.torch_arrays import tensor_of
from tests.adapters.merging import adapter, delta
from tests.torch_tensors import numbers

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(sizes)


@pytest.fixture(params=["single", "sharded"])
def pickled(request, model, tmp_path):
    """A tied model as transformers before 4.45 wrote it."""
    path = tmp_path / "pickled"
    model.config.save_pretrained(path)
    state = model.state_dict()  # with the head, which is the embedding
    if request.param == "single":
        torch.save(state, path / "pytorch_model.bin")
        return path
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name].clone() for name in part}, path / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("verb", ["convert", "info", "verify", "merge"])
def test_without_the_word_nothing_is_read_and_the_remedy_works(pickled, tmp_path, verb):
    call = {
        "convert": lambda: convert(pickled, tmp_path / "out"),
        "info": lambda: info(pickled),
        "verify": lambda: verify(pickled),
        "merge": lambda: merge(pickled, [adapter(delta(Q, 64, 64))], tmp_path / "out"),
    }[verb]
    with pytest.raises(UnsupportedError) as refused:
        call()
    assert "is a pickle, which can hold a program" in str(refused.value)
    remedy = f"loraformat convert {pickled} DENSE --to safetensors --allow-pickle"
    assert remedy in str(refused.value)
    convert(pickled, tmp_path / "dense", to_format="safetensors", allow_pickle=True)
    convert(tmp_path / "dense", tmp_path / "out")


def test_the_same_logits(pickled, model, tmp_path):
    report = convert(pickled, tmp_path / "dense", to_format="safetensors", allow_pickle=True)
    assert report.source_format == "pytorch"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = torch.arange(20)[None]
    assert torch.equal(opened(ids).logits, model(ids).logits)
    assert convert(pickled, tmp_path / "bundle", allow_pickle=True).quantized == 14
    assert info(pickled, allow_pickle=True).format == "pytorch"
    assert verify(pickled, allow_pickle=True).findings == []


def test_a_tied_head_is_written_once(model, tmp_path):
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    convert(tmp_path / "pickled", tmp_path / "dense", to_format="safetensors", allow_pickle=True)
    assert "lm_head.weight" not in load_file(tmp_path / "dense/model.safetensors")


def test_an_adapter_is_merged_into_pickled_weights(pickled, model, tmp_path):
    change = delta(Q, 64, 64)
    merge(pickled, [adapter(change)], tmp_path / "out", allow_pickle=True)
    merged = load_file(tmp_path / "out/model.safetensors")[Q]
    wanted = model.state_dict()[Q] + change.scaling * numbers(change.b) @ tensor_of(
        change.a.array()
    )
    torch.testing.assert_close(merged, wanted)


def test_safetensors_are_taken_before_a_pickle(pickled, tmp_path):
    save_file({"a": torch.ones(2, 2)}, pickled / "model.safetensors", {"format": "pt"})
    assert plugins.sniff(pickled).name == "safetensors"


class Program:
    """Would run when it is unpickled."""

    def __reduce__(self):
        return (exec, ("open('it-ran', 'w').close()",))


BAD = {
    "program": lambda path: torch.save({Q: torch.ones(2), "x": Program()}, path),
    "bare pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "list": lambda path: torch.save([torch.ones(2)], path),
    "number": lambda path: torch.save({"a": 1}, path),
    "huge view": lambda path: torch.save({"a": torch.ones(1).expand(1 << 40)}, path),
    "sparse": lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_pickle_of_tensors_is_refused(model, tmp_path, monkeypatch, bad):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pickled"
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    BAD[bad](path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        convert(path, tmp_path / "out", allow_pickle=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pickled"]


def test_an_index_that_does_not_belong_to_its_shards(model, tmp_path):
    path = tmp_path / "pickled"
    model.config.save_pretrained(path)
    torch.save({"a": torch.ones(2, 2)}, path / "x.bin")
    index = path / "pytorch_model.bin.index.json"
    for weight_map, error in (
        ({"a": "x.bin", "b": "x.bin"}, FormatError),
        ({"a": "gone.bin"}, InputError),
        ({"a": "../x.bin"}, FormatError),
        ({"a": "x.safetensors"}, FormatError),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error):
            convert(path, tmp_path / "out", allow_pickle=True)


def test_a_file_that_changes_meanwhile_is_noticed(model, tmp_path):
    path = tmp_path / "pickled"
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    opened = open_model(path, allow_pickle=True)
    with (path / "pytorch_model.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(FileChangedError):
        opened.close()


def test_quantized_weights_are_refused_with_what_helps_a_pickle(model, tmp_path):
    """No converter of a method reads pickles."""
    path = tmp_path / "pickled"
    model.config.save_pretrained(path)
    torch.save({Q: torch.ones(64, 64).to(torch.float8_e4m3fn)}, path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="is quantized with float8") as refused:
        convert(path, tmp_path / "out", allow_pickle=True)
    assert "start from the original, unquantized model" in refused.value.hint
