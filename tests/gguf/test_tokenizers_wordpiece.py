"""WordPiece: transformers, llama.cpp and the tokenizer made back give the same tokens."""

from __future__ import annotations

import json
import unicodedata

import pytest
from llama_runtime import tokenize
from loraformat_converters.gguf.container.reader import open_gguf
from made_tokenizers import CORPUS, TEXTS, compare, ids, model_of
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from loraformat.errors import UnsupportedError
from loraformat.ops.convert.convert import convert

ROWS = 640
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]
CONFIG = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
#: llama.cpp strips vowel signs with the accents: the one known difference.
INDIC = [text for text in TEXTS if "नमस्ते" in text]


def trained(**options):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=600, special_tokens=SPECIAL, show_progress=False, limit_alphabet=150
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


@pytest.mark.parametrize(
    "options",
    [{}, {"lowercase": False}, {"strip_accents": False},
     {"lowercase": False, "strip_accents": True}],
    ids=["uncased", "cased", "accents", "cased-without-accents"],
)  # fmt: skip
def test_agreement(options, tmp_path):
    source = model_of(tmp_path / "source", trained(**options), CONFIG, rows=ROWS, kind="bert")
    strips = options.get("strip_accents", options.get("lowercase", True))
    texts = [text for text in TEXTS if not strips or text not in INDIC]
    texts += [text.swapcase() for text in texts if "<tool>" not in text] + [
        "[MASK] is [UNK]",
        "x" * 90,
        "[unused0]",
    ]
    report = compare(source, tmp_path, texts)
    compare(source, tmp_path / "again", texts, special=True)
    assert any("June 2026" in note for note in report.notes) is (options != {})
    assert any("vowel signs" in note for note in report.notes) is strips
    assert any("capitals" in note for note in report.notes) is (options.get("lowercase") is None
                                                                or strips)  # fmt: skip
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.text("tokenizer.ggml.model") == "bert"
        assert file.integer("tokenizer.ggml.bos_token_id") == 2
        assert file.integer("tokenizer.ggml.seperator_token_id") == 3


@pytest.mark.parametrize("lowercase", [True, False])
def test_every_character_of_the_basic_plane(lowercase, tmp_path):
    """Whether it is dropped, ends a word, is a word, or belongs to one: a{it}b tells."""
    vocabulary = {text: number for number, text in enumerate([*SPECIAL, "a", "b", "##a", "##b"])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    source = model_of(tmp_path / "source", tokenizer, CONFIG, rows=16, kind="bert")
    convert(source, tmp_path / "model.gguf", dtype="f32")
    known = [chr(code) for code in range(1, 0x10000) if unicodedata.category(chr(code))[1] != "n"
             and not 0xD800 <= code < 0xE000]  # fmt: skip
    texts = ["[MASK]".join(f"a{character}b" for character in known[at : at + 4096])
             for at in range(0, len(known), 4096)]  # fmt: skip
    theirs = [one for text in texts for one in cut_at_mask(tokenizer.encode(
        text, add_special_tokens=False).ids)]  # fmt: skip
    ours = [one for ids in tokenize(tmp_path / "model.gguf", texts) for one in cut_at_mask(ids)]
    differ = [c for c, one, other in zip(known, theirs, ours, strict=True) if one != other]
    kinds = {unicodedata.category(character) for character in differ}
    assert not any(kind[0] in "LNZ" for kind in kinds), "letters, numbers, spaces"
    assert len(differ) < (800 if lowercase else 150) < len(known) / 50


def cut_at_mask(ids):
    found = [[]]
    for number in ids:
        if number == SPECIAL.index("[MASK]"):
            found.append([])
        else:
            found[-1].append(number)
    return found


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("normalizer", {"clean_text": False}, "clean_text off"),
        ("normalizer", {"handle_chinese_chars": False}, "handle_chinese_chars off"),
        ("normalizer", {"type": "Lowercase"}, "with Lowercase"),
        ("pre_tokenizer", {"type": "Whitespace"}, "with Whitespace"),
        ("model", {"continuing_subword_prefix": ""}, "continue a word"),
        ("model", {"unk_token": "a"}, "unknown words"),
        ("post_processor", {"type": "ByteLevel"}, "0 tokens before"),
    ],
)
def test_what_llama_cpp_would_cut_otherwise_is_refused(part, change, reason, tmp_path):
    source = model_of(tmp_path / "source", trained(), CONFIG, rows=ROWS, kind="bert")
    raw = json.loads((source / "tokenizer.json").read_bytes())
    raw[part] |= change
    (source / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UnsupportedError, match=reason):
        convert(source, tmp_path / "model.gguf")


def test_a_file_that_names_little(tmp_path):
    """As llama.cpp's script writes it: no normalizer, no BOS where the defaults fit."""
    from loraformat_converters.gguf.container.types import ValueType
    from loraformat_converters.gguf.container.values import GGUFValue
    from rewriting import rewrite

    source = model_of(tmp_path / "source", trained(), CONFIG, rows=ROWS, kind="bert")
    convert(source, tmp_path / "model.gguf", dtype="f32")
    bare = rewrite(tmp_path / "model.gguf", tmp_path / "bare.gguf",
                   drop=("tokenizer.ggml.normalizer", "tokenizer.ggml.add_"))  # fmt: skip
    convert(bare, tmp_path / "back", to_format="safetensors")
    texts = [text for text in TEXTS if text not in INDIC]
    assert ids(tmp_path / "back", texts, special=True) == tokenize(bare, texts, add_special=True)
    short = [f"t{number}" for number in range(50)]
    few = {
        "tokenizer__ggml__tokens": GGUFValue.of_array(ValueType.STRING, short),
        "tokenizer__ggml__token_type": GGUFValue.of_array(ValueType.INT32, [1] * 50),
    }
    none = rewrite(bare, tmp_path / "none.gguf", drop=("tokenizer.ggml.bos",), **few)
    report = convert(none, tmp_path / "without", to_format="safetensors")
    assert any("no bos token" in lost for lost in report.lost)
    assert not (tmp_path / "without" / "tokenizer.json").exists()
