"""P11: each layer is entered twice in a step, in the right order, and its pages come and go."""

import pytest
import torch

from loraformat.train import LoraOptions, load
from loraformat.train.engine import layer_prefetch
from tests.tiny_models import make_model
from tests.train.engine.reference import make_batch


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Six layers, one in each shard and larger than a page."""
    from loraformat.ops.convert.convert import convert

    directory = tmp_path_factory.mktemp("streaming")
    make_model("llama", directory / "dense", num_hidden_layers=6, hidden_size=128)
    convert(directory / "dense", directory / "bundle", max_shard_size=70_000)
    return directory / "bundle"


@pytest.fixture
def advice(monkeypatch):
    """What is read and let go, as (word, address, bytes)."""
    calls = []
    for word in ("read_pages", "forget_pages"):
        real = getattr(layer_prefetch, word)

        def record(address, nbytes, word=word, real=real):
            calls.append((word, address, nbytes))
            real(address, nbytes)

        monkeypatch.setattr(layer_prefetch, word, record)
    return calls


@pytest.mark.parametrize("rows", [None, 1])
def test_a_step_enters_each_layer_twice_up_and_down(bundle, rows):
    with load(bundle, lora=LoraOptions(rank=2)) as model:
        assert len(list(bundle.glob("model-*.safetensors"))) > 6
        model.loss(make_batch(), rows_at_once=rows).backward()
        assert model.traffic.visits == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
        model.traffic.visits.clear()
        with torch.no_grad():
            model.loss(make_batch(), rows_at_once=rows)
        assert model.traffic.visits == [0, 1, 2, 3, 4, 5]


def test_every_layer_is_read_before_it_is_computed_and_let_go_after(bundle, advice):
    with load(bundle, lora=LoraOptions(rank=2)) as model:
        ranges = [
            {(address, end - begin) for address, (_, begin, end) in layer}
            for layer in model.prefetcher._layers
        ]
        model.loss(make_batch()).backward()
    sizes = [sum(nbytes for _, nbytes in layer) for layer in ranges]
    assert all(size > 38_000 for size in sizes)  # 4.13 bits for each of 73 728 weights, norms
    for layer in ranges:
        words = [word for word, address, nbytes in advice if (address, nbytes) in layer]
        assert words.count("read_pages") >= 2 * len(layer) - 1
        assert words[0] == "read_pages" and words[-1] == "forget_pages"
        assert words.count("forget_pages") == 2 * len(layer)
    assert model.traffic.bytes_read >= 2 * sum(sizes)
    assert model.traffic.stall_seconds > 0


@pytest.mark.parametrize("options", [{"prefetch": False}, {"release": False}, {"drop_cache": True}])
def test_no_setting_changes_what_is_computed(bundle, options):
    found = []
    for chosen in ({}, options):
        with load(bundle, lora=LoraOptions(rank=2)) as model:
            for name, value in chosen.items():
                setattr(model.prefetcher, name, value)
            loss = model.loss(make_batch())
            loss.backward()
            gradients = [p.grad for p in model.trainable().values()]
            found.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_files_that_are_read_instead_of_mapped_are_never_let_go(bundle, advice, monkeypatch):
    monkeypatch.setenv("LORAFORMAT_IO", "pread")  # forgotten pages of such memory would be zero
    with load(bundle, lora=LoraOptions(rank=2)) as model:
        first = model.loss(make_batch()).item()
        assert model.loss(make_batch()).item() == first
    assert not advice
    monkeypatch.delenv("LORAFORMAT_IO")
    with load(bundle, lora=LoraOptions(rank=2)) as model:
        assert model.loss(make_batch()).item() == first


def test_a_step_of_generation_leaves_pages_where_they_are(bundle, advice):
    with load(bundle) as model, torch.no_grad():
        model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
        assert model.traffic.visits == []
    assert not advice


def test_generation_within_a_run_lets_layers_and_head_go(bundle, advice):
    tokens = torch.tensor([[5, 6, 7]])
    with load(bundle) as model:
        wanted = model.generate(tokens, max_new_tokens=3, do_sample=False)
        assert not advice
        with model.sparing():
            found = model.generate(tokens, max_new_tokens=3, do_sample=False)
        assert torch.equal(found, wanted)
        assert model.traffic.visits == [0, 1, 2, 3, 4, 5] * 3
        layers = [
            {(a, end - begin) for a, (_, begin, end) in one} for one in model.prefetcher._layers
        ]
    evict = [(address, nbytes) for word, address, nbytes in advice if word == "forget_pages"]
    assert all(evict.count(part) == 3 for layer in layers for part in layer)
    assert len(evict) > 3 * sum(map(len, layers))  # the head


def test_a_closed_model_holds_no_thread_and_no_file(bundle):
    import threading

    model = load(bundle, lora=LoraOptions(rank=2))
    model.loss(make_batch()).backward()
    model.close()
    model.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("loraformat-prefetch") for name in names)
    assert all(shard.descriptor < 0 for shard in model.bundle.shards)


def test_a_bundle_that_the_caller_opened_stays_open(bundle):
    import loraformat

    with loraformat.open_bundle(bundle) as here:
        load(here).close()
        assert all(shard.descriptor >= 0 for shard in here.shards)
