"""P11: each layer is entered twice in a step, in the right order, and its pages come and go."""

import pytest
import torch

from loraformat.train import LoraOptions, load
from loraformat.train.engine import layer_prefetch
from loraformat.train.engine.experts import ExpertStack
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


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Two layers of sixteen experts, of whom each token goes to two; experts larger than a page."""
    from loraformat.ops.convert.convert import convert

    directory = tmp_path_factory.mktemp("mixture")
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16}
    make_model("qwen3_moe", directory / "dense", **sizes)
    convert(directory / "dense", directory / "bundle")
    convert(directory / "dense", directory / "plain", skip=["*.experts.*"])
    return directory


@pytest.fixture(params=["bundle", "plain"])
def experts(request, mixture):
    """Returns a model, and the experts that were computed with, by the name of their stack."""
    used = {}
    with load(mixture / request.param, lora=LoraOptions(rank=2)) as model:
        model.loss(make_batch()).backward()  # which also tries gradients out
        for module in model.modules():
            if isinstance(module, ExpertStack):
                numbers = used[module] = set()
                module.register_forward_pre_hook(
                    lambda _, given, numbers=numbers: numbers.add(given[1])
                )
        yield model, used


def _bytes_of(spans):
    return sum(end - begin for _, (_, begin, end) in layer_prefetch._mapped(spans))


@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_only_experts_that_were_routed_to_are_read_once_in_each_pass(experts, budget):
    model, used = experts
    model.activation_memory = budget  # with it, the backward pass computes no layer again
    few = make_batch(rows=1, length=4)
    model.traffic.bytes_read = 0
    model.loss(few).backward()
    dense = sum(_bytes_of([span for _, span in layer]) for layer in model.prefetcher._layers)
    # The head is smaller than what is read of one at a time, and is not read ahead.
    routed = sum(_bytes_of(stack.spans[e]) for stack, some in used.items() for e in some)
    whole = sum(_bytes_of(spans) for stack in used for spans in stack.spans)
    assert len(used) == 4 and 0 < routed < whole / 2
    assert model.traffic.bytes_read == 2 * (dense + routed)


def test_experts_are_let_go_with_their_layer(experts, advice):
    model, used = experts
    model.activation_memory = 0
    model.loss(make_batch(rows=1, length=4)).backward()
    read = {call[1:] for call in advice if call[0] == "read_pages"}
    evicted = [(a, a + n) for word, a, n in advice if word == "forget_pages"]
    for stack, numbers in used.items():
        for expert in range(stack.count):
            ranges = list(layer_prefetch._mapped(stack.spans[expert]))
            assert all(((a, e - b) in read) == (expert in numbers) for a, (_, b, e) in ranges)
            for address, (_, begin, end) in ranges if expert in numbers else ():
                stop = address + end - begin
                assert sum(a <= address and stop <= b for a, b in evicted) == 2
    assert not model.prefetcher._parts


def test_a_step_of_generation_reads_no_experts_ahead(experts, advice):
    model, _ = experts
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[5, 6, 7]]))
    assert not advice
