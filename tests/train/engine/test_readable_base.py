"""Models that are no bundles are computed with as they are: eval and generate read any format."""

import pytest
import torch
import transformers

from loraformat.demo import SMALL_MODEL
from loraformat.errors import UnsupportedError
from loraformat.ops.convert.convert import convert
from loraformat.train import LoraOptions, load
from loraformat.train.engine import stored_weights
from tests.train.engine.reference import make_batch, relative
from tests.train.tiny_bundles import stored_model


@pytest.fixture(scope="module", params=["safetensors", "one file a shard", "bitsandbytes", "gguf"])
def written(request, bundle_of, tmp_path_factory):
    """A llama's bundle, and the same numbers in another format."""
    bundle, place = bundle_of("llama"), tmp_path_factory.mktemp("written")
    if request.param == "safetensors":
        return bundle, bundle.parent / "stored"
    if request.param == "one file a shard":
        transformers.AutoModelForCausalLM.from_pretrained(
            bundle.parent / "stored", dtype=torch.float32
        ).save_pretrained(place / "sharded", max_shard_size="40KB")
        assert len(list((place / "sharded").glob("*.safetensors"))) > 5
        return bundle, place / "sharded"
    if request.param == "bitsandbytes":
        convert(bundle, place / "bnb", to_format="bitsandbytes")
        return bundle, place / "bnb"
    convert(SMALL_MODEL, place / "bundle")  # which has a tokenizer
    convert(place / "bundle", place / "stored", to_format="safetensors", dtype="f32")
    convert(place / "bundle", place / "model.gguf", dtype="f32")
    return place / "bundle", place / "model.gguf"


@pytest.mark.parametrize("kept", [1 << 30, 0])
def test_every_format_computes_what_the_bundle_does(written, tmp_path, monkeypatch, kept):
    bundle, other = written
    monkeypatch.setattr(stored_weights, "_KEPT", kept)
    batch = make_batch()
    with load(bundle, lora=LoraOptions(rank=2, init="orthogonal")) as trained:
        trained.save_adapter(tmp_path / "adapter")
    for adapter in (None, tmp_path / "adapter"):
        with (
            load(bundle, adapter=adapter) as base,
            load(other, adapter=adapter, to_train=False) as model,
            torch.no_grad(),
        ):
            wanted = base.eval()(input_ids=batch.input_ids).logits
            found = model.eval()(input_ids=batch.input_ids).logits
            assert relative(found, wanted) < 1e-6
            assert relative(model.loss(batch), base.loss(batch)) < 1e-6
            prompt = batch.input_ids[:1, :4]
            same = [m.generate(prompt, max_new_tokens=5, do_sample=False) for m in (base, model)]
            assert torch.equal(*same)
    dense = stored_model(bundle)
    with load(other, to_train=False) as model, torch.no_grad():
        found = model.eval()(input_ids=batch.input_ids).logits
        assert relative(found, dense(batch.input_ids).logits) < 1e-5


def test_computed_tensors_are_kept_within_a_bound(written, monkeypatch):
    _, other = written
    kept = []
    of = stored_weights._Kept.of

    def watched(self, tensor):
        found = of(self, tensor)
        kept.append(sum(x.nbytes for x in self._tensors.values()))
        return found

    monkeypatch.setattr(stored_weights._Kept, "of", watched)
    monkeypatch.setattr(stored_weights, "_KEPT", 50_000)
    with load(other, to_train=False) as model, torch.no_grad():
        model.eval()(input_ids=make_batch().input_ids)
        sizes = [tensor.nbytes for tensor in model.bundle.tensors.values()]
    assert bool(kept) == (other.suffix == ".gguf")
    assert all(size <= max(50_000, *sizes) < sum(sizes) for size in kept)


def test_what_is_no_bundle_is_not_trained_on(written):
    _, other = written
    with pytest.raises(UnsupportedError, match="only bundles are trained on") as caught:
        load(other, lora=LoraOptions())
    assert f"loraformat convert {other}" in caught.value.hint
    with load(other, to_train=False) as model, pytest.raises(UnsupportedError):
        model.save_adapter(other.parent / "adapter")
