"""The engine with the branches of the LoRA side: what a user opens, trains and saves."""

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
import trl

from loraformat.errors import UnsupportedError
from loraformat.train import LoraOptions, load
from tests.train.engine.reference import make_batch, relative
from tests.train.tiny_bundles import stored_model


def train(model, steps=3, seed=0):
    """Take some steps of plain gradient descent and return the losses."""
    losses = []
    for step in range(steps):
        batch = make_batch(seed=seed + step)
        loss = model.loss(batch) / batch.trained
        loss.backward()
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter -= 0.3 * parameter.grad
                parameter.grad = None
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gemma2", "llama-tied"])
def test_a_saved_adapter_is_the_same_in_peft_and_opened_again(bundle_of, tmp_path, architecture):
    bundle = bundle_of(architecture)
    options = LoraOptions(rank=4, alpha=8, embeddings=architecture == "gemma2", head=True)
    if architecture == "llama-tied":
        options = LoraOptions(rank=4, rslora=True, targets=("attention",))
    with load(bundle, lora=options) as model:
        model.eval()
        train(model)
        ids = make_batch().input_ids
        with torch.no_grad():
            found = model(input_ids=ids).logits
        path = model.save_adapter(tmp_path / "adapter")
    with load(bundle, adapter=path) as again, torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, found)
    dense = stored_model(bundle)
    with torch.no_grad():
        before = dense(input_ids=ids).logits
        wrapped = peft.PeftModel.from_pretrained(dense, path).eval()
        assert relative(wrapped(input_ids=ids).logits, found) < 1e-5
        assert relative(before, found) > 1e-3


@pytest.mark.parametrize("rows", [None, 1])
def test_second_moments_are_collected_once_in_each_step(bundle_of, rows):
    batch = make_batch()
    with load(bundle_of("llama"), lora=LoraOptions(rank=4)) as model:
        with torch.no_grad():
            for name, parameter in model.trainable().items():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        model.loss(batch, rows_at_once=rows).backward()
        counts = {n: v for n, v in model.extra_state().items() if n.endswith("count")}
    assert len(counts) == 14
    # All but the last token of each row have a part in the loss.
    assert counts["model.layers.0.mlp.up_proj.moments.count"] == pytest.approx(46, abs=0.05)
    assert all(0 < count < 46.1 for count in counts.values())


def test_a_loop_of_transformers_own_trains(bundle_of, tmp_path):
    batch = make_batch(rows=4)
    pairs = zip(batch.input_ids, batch.labels, strict=True)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    with load(bundle_of("llama"), lora=LoraOptions(rank=4)) as model:
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=8, learning_rate=0.02, logging_steps=1, report_to=[],
            save_strategy="no", per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0] - 0.1
        assert (model.save_adapter(tmp_path / "adapter") / "adapter_config.json").is_file()


def test_generation_drops_nothing_and_leaves_the_mode_as_it_was(bundle_of):
    ids = make_batch(rows=1, length=6).input_ids
    with load(bundle_of("gpt2")) as model:  # whose config drops a tenth
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
        expected = stored_model(bundle_of("gpt2")).generate(ids, **options)
        assert torch.equal(model.generate(ids, **options), expected)
        assert model.training


def test_generation_uses_a_cache_and_the_adapter(bundle_of):
    bundle = bundle_of("llama")
    ids = make_batch(rows=1, length=6).input_ids
    with load(bundle, lora=LoraOptions(rank=4)) as model:
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
        base = model.generate(ids, **options)
        expected = stored_model(bundle).generate(ids, **options)
        assert torch.equal(base, expected)
        with torch.no_grad():
            for name, parameter in model.trainable().items():
                if "lora_B" in name:
                    parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
        tuned = model.generate(ids, **options)
        assert not torch.equal(tuned, base)
        with torch.no_grad():
            for position in range(6, tuned.shape[1]):
                logits = model.eval()(input_ids=tuned[:, :position]).logits[0, -1]
                assert logits.argmax() == tuned[0, position]


def test_trl_trains(bundle_of, tmp_path):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="b", pad_token="b"
    )
    batch = make_batch(rows=4)
    rows = {"input_ids": batch.input_ids.tolist(), "labels": batch.labels.tolist()}
    bundle = bundle_of("llama")
    with load(bundle, lora=LoraOptions(rank=4)) as model:
        arguments = trl.SFTConfig(
            tmp_path, max_steps=8, learning_rate=0.02, logging_steps=1, report_to=[], bf16=False,
            save_strategy="no", per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model.for_trl(), arguments, train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tokenizer,
        )  # fmt: skip
        model.train()
        begun = (model.loss(batch) / batch.trained).item()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[0] == pytest.approx(begun, abs=1e-4)
        assert losses[-1] < losses[0] - 0.1
        assert (model.save_adapter(tmp_path / "adapter") / "adapter_config.json").is_file()
    with (
        load(bundle, lora=LoraOptions(rank=4, head=True)) as model,
        pytest.raises(UnsupportedError, match="this head is trained"),
    ):
        model.for_trl()
