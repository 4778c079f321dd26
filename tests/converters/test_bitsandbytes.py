"""bitsandbytes checkpoints: what bitsandbytes itself makes goes in, and the rest is refused."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from loraformat_converters import bitsandbytes, safetensors
from safetensors.torch import load_file, save_file

from loraformat.errors import FormatError, InputError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert

NAME = "model.layers.0.mlp.up_proj.weight"
NF4_CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
}


def quantize(weight, **options):
    """Return the tensors of one weight as bitsandbytes saves them."""
    packed, state = bnb.quantize_4bit(weight, **{"quant_type": "nf4"} | options)
    parts = {f"{NAME}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {NAME: packed} | parts


def write(path, tensors, config=None):
    path.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors"
    )
    if config is not None:
        text = json.dumps({"model_type": "llama", "quantization_config": config}, indent=2)
        (path / "config.json").write_text(text)
    return path


@pytest.fixture
def weight():
    """256 columns: bitsandbytes decodes wrongly where a row is not a whole number of blocks."""
    return torch.randn(128, 256, generator=torch.Generator().manual_seed(0))


class TestBlocks:
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
    def test_all_sizes_go_through(self, tmp_path, weight, block_size, double_quant):
        tensors = quantize(weight, blocksize=block_size, compress_statistics=double_quant)
        source = write(tmp_path / "source", tensors, NF4_CONFIG)
        convert(source, tmp_path / "bundle")
        convert(tmp_path / "bundle", tmp_path / "back", to_format="bitsandbytes")
        found = load_file(tmp_path / "back" / "model.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(found[name], tensor), name

    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("block_size", [32, 64, 128, 256])
    def test_they_decode_as_bitsandbytes_decodes(self, tmp_path, weight, block_size, double_quant):
        packed, state = bnb.quantize_4bit(
            weight, quant_type="nf4", blocksize=block_size, compress_statistics=double_quant
        )
        tensors = quantize(weight, blocksize=block_size, compress_statistics=double_quant)
        source = write(tmp_path / "source", tensors, NF4_CONFIG)
        convert(source, tmp_path / "dense", to_format="safetensors")
        ours = load_file(tmp_path / "dense" / "model.safetensors")[NAME]
        assert torch.equal(ours, bnb.dequantize_4bit(packed, state))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_all_dtypes(self, tmp_path, weight, dtype):
        packed, state = bnb.quantize_4bit(weight.to(dtype), quant_type="nf4")
        source = write(tmp_path / "source", quantize(weight.to(dtype)), NF4_CONFIG)
        convert(source, tmp_path / "dense", to_format="safetensors")
        ours = load_file(tmp_path / "dense" / "model.safetensors")[NAME]
        assert ours.dtype == dtype
        assert torch.equal(ours, bnb.dequantize_4bit(packed, state))

    def test_a_shape_that_bitsandbytes_decodes_wrongly(self, tmp_path):
        """Rows of 48 in blocks of 64: its AVX-512 kernel takes wrong scales; the file is sound."""
        weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
        source = write(tmp_path / "source", quantize(weight), NF4_CONFIG)
        convert(source, tmp_path / "dense", to_format="safetensors")
        ours = load_file(tmp_path / "dense" / "model.safetensors")[NAME]
        assert (ours - weight).norm() / weight.norm() < 0.11

    def test_an_odd_count(self, tmp_path):
        weight = torch.randn(3, 25, generator=torch.Generator().manual_seed(0))
        tensors = quantize(weight)
        convert(write(tmp_path / "source", tensors, NF4_CONFIG), tmp_path / "bundle")
        convert(tmp_path / "bundle", tmp_path / "back", to_format="bitsandbytes")
        assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")[NAME], tensors[NAME])


class TestRecognising:
    def test_without_a_config_the_names_tell(self, tmp_path, weight):
        source = write(tmp_path / "source", quantize(weight))
        for path in (source, source / "model.safetensors"):
            assert bitsandbytes.CONVERTER.sniff(path) and not safetensors.CONVERTER.sniff(path)
        report = convert(source / "model.safetensors", tmp_path / "bundle")
        assert (report.source_format, report.quantized) == ("bitsandbytes", 1)

    def test_the_wrong_word_after_from(self, tmp_path, weight):
        quantized = write(tmp_path / "quantized", quantize(weight))
        with pytest.raises(UnsupportedError, match="use --from bitsandbytes"):
            convert(quantized, tmp_path / "out", from_format="safetensors")
        dense = write(tmp_path / "dense", {NAME: weight})
        with pytest.raises(UnsupportedError, match="use --from safetensors"):
            convert(dense, tmp_path / "out", from_format="bitsandbytes")
        assert not (tmp_path / "out").exists()


class TestRefused:
    @pytest.fixture(scope="class")
    def dense_model(self, tmp_path_factory):
        transformers.utils.logging.disable_progress_bar()
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=8,
        )  # fmt: skip
        path = tmp_path_factory.mktemp("dense")
        transformers.LlamaForCausalLM(config).save_pretrained(path)
        return path

    @pytest.mark.parametrize(
        "name, options",
        [
            ("bitsandbytes-fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
            ("bitsandbytes-int8", {"load_in_8bit": True}),
        ],
    )
    @pytest.mark.parametrize("with_config", [True, False])
    def test_fp4_and_int8_by_name(self, dense_model, tmp_path, name, options, with_config):
        """Real ones, quantized and saved by transformers; also where the config is lost."""
        model = transformers.AutoModelForCausalLM.from_pretrained(
            dense_model, quantization_config=transformers.BitsAndBytesConfig(**options)
        )
        model.save_pretrained(tmp_path / "source")
        if not with_config:
            (tmp_path / "source" / "config.json").unlink()
        for wrong in ("bitsandbytes", "safetensors"):
            with pytest.raises(UnsupportedError, match="is quantized") as refused:
                convert(tmp_path / "source", tmp_path / "bundle", from_format=wrong)
            assert refused.value.hint == f"use --from {name}"
            assert not (tmp_path / "bundle").exists()
        assert convert(tmp_path / "source", tmp_path / "bundle").source_format == name

    def test_fp4_under_the_name_of_nf4(self, tmp_path, weight):
        tensors = {
            n.replace("__fp4", "__nf4"): t for n, t in quantize(weight, quant_type="fp4").items()
        }
        with pytest.raises(FormatError, match="quant_type is fp4, wanted nf4"):
            convert(write(tmp_path / "source", tensors, NF4_CONFIG), tmp_path / "bundle")

    def test_a_missing_part(self, tmp_path, weight):
        tensors = quantize(weight)
        del tensors[f"{NAME}.absmax"]
        with pytest.raises(FormatError, match=r"absmax is missing"):
            convert(write(tmp_path / "source", tensors, NF4_CONFIG), tmp_path / "bundle")

    def test_a_missing_quant_state(self, tmp_path, weight):
        tensors = quantize(weight)
        del tensors[f"{NAME}.quant_state.bitsandbytes__nf4"]
        with pytest.raises(InputError, match="quant state is missing"):
            convert(write(tmp_path / "source", tensors, NF4_CONFIG), tmp_path / "bundle")

    def test_scales_that_do_not_fit(self, tmp_path, weight):
        tensors = quantize(weight)
        tensors[f"{NAME}.absmax"] = tensors[f"{NAME}.absmax"][:-1]
        with pytest.raises(FormatError, match="N03"):
            convert(write(tmp_path / "source", tensors, NF4_CONFIG), tmp_path / "bundle")

    def test_another_table(self, tmp_path, weight):
        tensors = quantize(weight)
        tensors[f"{NAME}.quant_map"] = tensors[f"{NAME}.quant_map"] * 0.5
        with pytest.raises(FormatError, match="N04"):
            convert(write(tmp_path / "source", tensors, NF4_CONFIG), tmp_path / "bundle")

    def test_nothing_is_quantized(self, tmp_path, weight):
        source = write(tmp_path / "source", {NAME: weight}, NF4_CONFIG)
        with pytest.raises(UnsupportedError, match="holds no NF4 weight"):
            convert(source, tmp_path / "bundle")

    @pytest.mark.parametrize(
        "options", [{"block_size": 128}, {"double_quant": False}, {"skip": ["*"]}], ids=str
    )
    def test_quantizing_twice(self, tmp_path, weight, options):
        source = write(tmp_path / "source", quantize(weight), NF4_CONFIG)
        with pytest.raises(UsageError, match="never quantized twice"):
            convert(source, tmp_path / "bundle", **options)


@pytest.mark.parametrize(
    ("columns", "block_size", "is_said"),
    [(96, 64, True), (160, 64, True), (192, 128, True), (64, 64, False), (192, 64, False),
     (96, 32, False), (33, 64, False)],
)  # fmt: skip
def test_rows_that_bitsandbytes_decodes_wrongly_on_a_cpu_are_named(
    tmp_path, columns, block_size, is_said
):
    weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(0))
    write(tmp_path / "m", {NAME: weight})
    options = {"block_size": block_size, "to_format": "bitsandbytes"}
    report = convert(tmp_path / "m", tmp_path / "out", **options)
    assert any("decodes these incorrectly" in note for note in report.notes) == is_said
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    parts = {n.removeprefix(f"{NAME}."): t for n, t in tensors.items() if n != NAME}
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    found = bnb.dequantize_4bit(tensors[NAME], state).float()
    convert(tmp_path / "out", tmp_path / "dense", to_format="safetensors", dtype="f32")
    wanted = load_file(tmp_path / "dense" / "model.safetensors")[NAME]
    assert float((wanted - weight).norm() / weight.norm()) < 0.2, "the codes are right"
    if not is_said:
        assert torch.allclose(found, wanted, atol=1e-5)
    elif torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert not torch.allclose(found, wanted, atol=0.1), "bitsandbytes has mended it: say so"


def test_the_remedies_for_a_cpu_hold(tmp_path):
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    write(tmp_path / "m", {NAME: weight, NAME.replace("up", "down"): weight[:, :64].clone()})
    for name, options in {"blocks": {"block_size": 32}, "plain": {"skip": ["*.up_proj"]}}.items():
        report = convert(tmp_path / "m", tmp_path / name, to_format="bitsandbytes", **options)
        assert not any("decodes these incorrectly" in note for note in report.notes)
