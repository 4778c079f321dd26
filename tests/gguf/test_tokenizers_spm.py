"""SentencePiece: transformers, llama.cpp and the tokenizer made back give the same tokens."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import sentencepiece
from llama_runtime import tokenize
from loraformat_converters.gguf.container.reader import open_gguf
from made_spm import add, pieces, tokenizer_json, trained, write
from made_tokenizers import TEXTS, compare, ids, model_of

from loraformat.errors import InputError, UnsupportedError, UsageError
from loraformat.ops.convert.convert import convert

ROWS = 720
SPECIAL = {
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"},
}
_PARTS = [
    " ", "  ", "   ", "\t", "\n", "\n\n", "▁", "a", "aa", "the", " def", "return x", "self.",
    "é", "ß", "漢", "🙂", "\u200d", "\x00", "\x7f", "<0x0A>", "<s>", "<|end|>", "1", "99",
    "==", "====", "</", ">", "unk", "[PAD703]", "\r\n", "____",
]  # fmt: skip


def mixtures(count=400):
    """Texts that nobody writes, of parts that matter."""
    chance = random.Random(4)
    runs = [c * n for c in " \n\t=▁a" for n in (*range(2, 20), 40)]
    return [
        "".join(chance.choice(_PARTS + runs) for _ in range(chance.randrange(1, 12)))
        for _ in range(count)
    ]


def source_of(directory, tokenizer, *, kind="llama", config=SPECIAL["llama"]):
    return write(model_of(directory, None, config, rows=ROWS, kind=kind), tokenizer)


@pytest.mark.parametrize("by", ["score", "number"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_natural_forms(name, by, tmp_path):
    tokenizer = tokenizer_json(trained(name), by=by)
    add(tokenizer, "<|start|>", "<|end|>")
    add(tokenizer, "<tool>", special=False)
    source = source_of(tmp_path / "source", tokenizer, config=SPECIAL[name])
    report = compare(source, tmp_path, TEXTS + mixtures())
    assert not [note for note in report.notes if "token" in note]
    compare(source, tmp_path / "again", special=True)
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.text("tokenizer.ggml.model") == "llama"
        assert file.flag("tokenizer.ggml.add_space_prefix") is (name == "llama")
        assert file.flag("tokenizer.ggml.add_bos_token")
        kinds = file.array("tokenizer.ggml.token_type")
    unknown = 0 if name == "llama" else 3
    assert kinds[unknown] == 2 and kinds.count(6) == 256 and kinds.count(5) == 720 - len(
        pieces(trained(name))) - 3  # fmt: skip


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_says_where_it_differs(scheme, tmp_path):
    tokenizer = add(tokenizer_json(trained(), metaspace=scheme), "<|start|>", "<|end|>")
    source = source_of(tmp_path / "source", tokenizer)
    texts = TEXTS + mixtures()
    if scheme != "never":
        texts = [text for text in texts if text[:1] not in (" ", "▁") and "|>" not in text]
        texts = [text for text in texts if "<s>" not in text]
    report = convert(source, tmp_path / "model.gguf", dtype="f32")
    assert tokenize(tmp_path / "model.gguf", texts) == ids(source, texts)
    said = " ".join(report.notes)
    assert ("begins with a space" in said) is (scheme != "never")
    assert ("after special tokens" in said) is (scheme == "first")
    spaced = [" the self", "<|end|>x"]
    same = [a == b for a, b in zip(ids(source, spaced), tokenize(tmp_path / "model.gguf", spaced),
                                   strict=True)]  # fmt: skip
    assert same == [scheme == "never", scheme != "first"]


def test_phi3_strips_spaces_behind_its_tokens(tmp_path):
    """llama.cpp does so by the model's name, if the model has the tokens that it then wants."""
    tokenizer = add(tokenizer_json(trained()), "<|endoftext|>")
    add(tokenizer, "<|user|>", "<|end|>", rstrip=True)
    for token in tokenizer["added_tokens"]:
        token["rstrip"] = token["content"] in ("</s>", "<|user|>", "<|end|>")
    source = source_of(tmp_path / "phi-3-tiny", tokenizer, kind="phi3")
    texts = ["<|user|>\nHello<|end|>\n<|user|>  x", "<s> a<|endoftext|> b</s>\n c"]
    report = convert(source, tmp_path / "phi-3.gguf", dtype="f32")
    assert tokenize(tmp_path / "phi-3.gguf", texts) == ids(source, texts)
    assert any("strip" in note for note in report.notes)


def test_runs_of_mixed_order_play_both_rules(tmp_path):
    """Gemma's user-defined runs have one score, so that their merges lie between each other."""
    tokenizer = tokenizer_json(trained("gemma"), by="score")
    runs = [left + right for left, right in tokenizer["model"]["merges"]
            if not (left + right).strip("▁")]  # fmt: skip
    assert runs != sorted(runs, key=runs.index) or len(set(runs)) < len(runs)
    order = [run for number, run in enumerate(runs) if number == 0 or runs[number - 1] != run]
    assert len(order) > len(set(order)), "some token has merges before and after another's"
    source = source_of(tmp_path / "source", tokenizer, config=SPECIAL["gemma"])
    texts = [f"{a}{' ' * n}{b}" for n in range(1, 40) for a in ("", "x", "\n") for b in ("", "y")]
    compare(source, tmp_path, texts)


def changed(**model):
    tokenizer = tokenizer_json(trained())
    tokenizer["model"].update(model)
    return tokenizer


def without_a_merge():
    tokenizer = tokenizer_json(trained())
    merges = tokenizer["model"]["merges"]
    built = [left + right for left, right in merges]
    merges.pop(next(n for n, text in enumerate(built) if built.count(text) > 1))
    return tokenizer


def without_a_byte():
    tokenizer = tokenizer_json(trained())
    del tokenizer["model"]["vocab"]["<0xE9>"]
    return tokenizer


def lower_case():
    return {**tokenizer_json(trained()), "normalizer": {"type": "Lowercase"}}


def whole_words():
    tokenizer = tokenizer_json(trained(), metaspace="always")
    tokenizer["pre_tokenizer"]["split"] = True
    return tokenizer


def unigram():
    table = [[piece.piece, piece.score] for piece in pieces(trained("unigram"))]
    model = {"type": "Unigram", "unk_id": 0, "vocab": table, "byte_fallback": True}
    return {**tokenizer_json(trained()), "model": model}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (without_a_merge, r"SentencePiece merges .* and .* into .*tokenizer\.json does not"),
        (without_a_byte, "no token for the byte <0xE9>"),
        (lambda: changed(byte_fallback=False, vocab={"a": 5}, merges=[]), "for the byte <0x00>"),
        (lower_case, "normalizes texts with Lowercase"),
        (whole_words, "splits texts at spaces"),
        (unigram, "of type Unigram"),
        (lambda: changed(ignore_merges=True), "ignore_merges"),
        (lambda: changed(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda: changed(vocab={**tokenizer_json(trained())["model"]["vocab"], "x" * 300: 718}),
         "300 characters"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_cut_otherwise_is_refused(make, reason, tmp_path):
    source = source_of(tmp_path / "source", make())
    with pytest.raises(UnsupportedError, match=reason):
        convert(source, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_merges_out_of_order_are_named(tmp_path):
    tokenizer = tokenizer_json(trained())
    merges = tokenizer["model"]["merges"]
    built = [left + right for left, right in merges]
    merges.append(merges.pop(next(n for n, text in enumerate(built) if built.count(text) > 1)))
    report = convert(source_of(tmp_path / "source", tokenizer), tmp_path / "model.gguf")
    assert any("in varying order" in note for note in report.notes)


def test_merges_of_another_trainer_are_refused(tmp_path):
    """The trainer of `tokenizers` keeps one merge for a token, SentencePiece has all."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    alphabet = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["banana bandana an na ana nab"] * 3, trainer)
    source = model_of(tmp_path / "source", tokenizer, rows=ROWS)
    raw = json.loads((source / "tokenizer.json").read_bytes())
    raw["added_tokens"] = []
    write(source, raw)
    with pytest.raises(UnsupportedError, match="SentencePiece merges"):
        convert(source, tmp_path / "model.gguf")


def test_a_name_of_a_pre_tokenizer_is_for_byte_level_bpe(tmp_path):
    source = source_of(tmp_path / "source", tokenizer_json(trained()))
    with pytest.raises(UsageError, match="byte-level BPE"):
        convert(source, tmp_path / "model.gguf", pre="llama-bpe")


def test_tied_scores_come_back_with_a_warning(tmp_path):
    from loraformat_converters.gguf.container.types import ValueType
    from loraformat_converters.gguf.container.values import GGUFValue
    from rewriting import rewrite

    source = source_of(tmp_path / "source", tokenizer_json(trained()))
    convert(source, tmp_path / "model.gguf", dtype="f32")
    flat = GGUFValue.of_array(ValueType.FLOAT32, [-1000.0] * ROWS)
    rewrite(tmp_path / "model.gguf", tmp_path / "flat.gguf", tokenizer__ggml__scores=flat)
    report = convert(tmp_path / "flat.gguf", tmp_path / "back", to_format="safetensors")
    assert any("equal scores" in note for note in report.lost)


def test_damaged_metadata(tmp_path):
    from loraformat_converters.gguf.container.types import ValueType
    from loraformat_converters.gguf.container.values import GGUFValue
    from rewriting import rewrite

    source = source_of(tmp_path / "source", tokenizer_json(trained()))
    convert(source, tmp_path / "model.gguf", dtype="f32")
    for key, value, reason in [
        ("scores", GGUFValue.of_array(ValueType.FLOAT32, [0.0]), "scores of 1"),
        ("scores", GGUFValue.of_array(ValueType.FLOAT32, [float("nan")] * ROWS), "not finite"),
        ("scores", GGUFValue.of_array(ValueType.STRING, ["x"] * ROWS), "scores"),
        ("token_type", GGUFValue.of_array(ValueType.INT32, [1]), "types of 1"),
        ("add_space_prefix", GGUFValue.of(ValueType.UINT32, 1), "add_space_prefix"),
    ]:
        (tmp_path / "bad.gguf").unlink(missing_ok=True)
        rewrite(tmp_path / "model.gguf", tmp_path / "bad.gguf",
                **{f"tokenizer__ggml__{key}": value})  # fmt: skip
        with pytest.raises(InputError, match=reason):
            convert(tmp_path / "bad.gguf", tmp_path / "no", to_format="safetensors")


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_vocabulary_of_gguf_py(name, tmp_path):
    """As llama.cpp's scripts write it: no default is named, user-defined pieces are normal."""
    import gguf
    from loraformat_converters.gguf.container.types import ValueType
    from loraformat_converters.gguf.container.values import GGUFValue
    from rewriting import rewrite

    source = source_of(tmp_path / "source", tokenizer_json(trained(name)), config=SPECIAL[name])
    (source / "tokenizer.model").write_bytes(trained(name))
    vocabulary = [*gguf.SentencePieceVocab(source).all_tokens()]
    vocabulary += [(f"[PAD{n}]".encode(), -10000.0, 5) for n in range(len(vocabulary), ROWS)]
    texts, scores, kinds = zip(*vocabulary, strict=True)
    convert(source, tmp_path / "model.gguf", dtype="f32")
    rewrite(
        tmp_path / "model.gguf", tmp_path / "peer.gguf",
        drop=("loraformat.", "tokenizer.ggml.", "tokenizer.ggml.pre"),
        tokenizer__ggml__model=GGUFValue.of(ValueType.STRING, "llama"),
        tokenizer__ggml__tokens=GGUFValue.of_array(
            ValueType.STRING, [text.decode() for text in texts]),
        tokenizer__ggml__scores=GGUFValue.of_array(ValueType.FLOAT32, scores),
        tokenizer__ggml__token_type=GGUFValue.of_array(ValueType.INT32, [int(k) for k in kinds]),
        **({} if name == "llama" else {
            "tokenizer__ggml__add_space_prefix": GGUFValue.of(ValueType.BOOL, False),
            "tokenizer__ggml__bos_token_id": GGUFValue.of(ValueType.UINT32, 2),
            "tokenizer__ggml__unknown_token_id": GGUFValue.of(ValueType.UINT32, 3)}),
    )  # fmt: skip
    report = convert(tmp_path / "peer.gguf", tmp_path / "back", to_format="safetensors")
    texts = TEXTS + mixtures()
    theirs = tokenize(tmp_path / "peer.gguf", texts, add_special=True)
    assert ids(tmp_path / "back", texts, special=True) == theirs
    assert not any("tokenized differently" in lost for lost in report.lost)


def test_special_tokens_and_templates_come_back(tmp_path):
    import transformers

    template = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
    config = {**SPECIAL["llama"], "chat_template": template, "add_bos_token": True}
    source = source_of(tmp_path / "source", add(tokenizer_json(trained()), "<|start|>", "<|end|>"),
                       config=config)  # fmt: skip
    convert(source, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "back", to_format="safetensors")
    one, other = (
        transformers.AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "back")
    )
    for kind in ("bos_token_id", "eos_token_id", "unk_token_id", "chat_template"):
        assert getattr(one, kind) == getattr(other, kind), kind
    messages = [{"role": "user", "content": "Hello  world\n"}]
    found = one.apply_chat_template(messages), other.apply_chat_template(messages)
    assert found[0]["input_ids"] == found[1]["input_ids"]
    text = one.decode(one("The  café\n\tx 漢")["input_ids"], skip_special_tokens=True)
    assert other.decode(one("The  café\n\tx 漢")["input_ids"], skip_special_tokens=True) == (
        "The  café\n\tx 漢"
    )
    assert text


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_much_text(name, tmp_path):
    """A part of Python's standard library, cut by four programs."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files[:60])
    texts = [text[at : at + 3000] for at in range(0, len(text), 3000)]
    model = trained(name, tuple(texts[:150]), vocab_size=4000)
    tokenizer = tokenizer_json(model)
    source = model_of(tmp_path / "source", None, SPECIAL[name], rows=4000)
    write(source, tokenizer)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model).encode(texts[-100:])
    compare(source, tmp_path, texts[-100:])
    assert ids(source, texts[-100:]) == theirs
    assert sum(map(len, theirs)) > 50_000
