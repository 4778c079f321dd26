"""``tokenizer.model``: read as SentencePiece reads it, refused where it is damaged."""

from __future__ import annotations

import json
import random
import time

import pytest
import sentencepiece
from llama_runtime import tokenize
from loraformat_converters.gguf.container.reader import open_gguf
from loraformat_converters.gguf.tokenizers.model_proto import parse
from loraformat_converters.gguf.tokenizers.protobuf import WireError
from made_spm import trained
from made_tokenizers import TEXTS, ids, model_of
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from test_tokenizers_spm import ROWS, mixtures

from loraformat.errors import InputError, UnsupportedError
from loraformat.ops.convert.convert import convert

#: SentencePiece knows no special tokens in a text, and cuts it at NUL.
PLAIN = [text for text in TEXTS + mixtures() if "<s>" not in text and "|>" not in text
         and "\x00" not in text and "▁" not in text]  # fmt: skip


def source_of(directory, model, config=None):
    source = model_of(directory, None, config, rows=ROWS)
    (source / "tokenizer.model").write_bytes(model)
    return source


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_agreement_with_sentencepiece(name, tmp_path):
    model = trained(name)
    source = source_of(tmp_path / "source", model)
    report = convert(source, tmp_path / "model.gguf", dtype="f32")
    assert report.notes == () or not any("normalize" in note for note in report.notes)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    theirs = [processor.encode(text) for text in PLAIN]
    ours = tokenize(tmp_path / "model.gguf", PLAIN)
    for text, one, other in zip(PLAIN, theirs, ours, strict=True):
        assert one == other, repr(text)
    with_bos = tokenize(tmp_path / "model.gguf", ["a"], add_special=True)
    assert with_bos == [[processor.bos_id(), *processor.encode("a")]]
    convert(tmp_path / "model.gguf", tmp_path / "back", to_format="safetensors")
    for text, one, other in zip(PLAIN, theirs, ids(tmp_path / "back", PLAIN), strict=True):
        assert one == other, f"made back, {text!r}"


def test_tokens_that_were_added_later(tmp_path):
    config = {
        "add_bos_token": False, "add_eos_token": True, "eos_token": "</s>",
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "700": {"content": "<|end|>", "special": True},
            "701": {"content": "<tool>", "special": False},
        },
    }  # fmt: skip
    source = source_of(tmp_path / "source", trained(), config)
    (source / "added_tokens.json").write_text(json.dumps({"<extra>": 702}))
    convert(source, tmp_path / "model.gguf", dtype="f32")
    found = tokenize(tmp_path / "model.gguf", ["<tool><|end|><extra>"], add_special=True)
    assert found == [[701, 700, 702, 2]]
    with open_gguf(tmp_path / "model.gguf") as file:
        kinds = file.array("tokenizer.ggml.token_type")
        assert [kinds[n] for n in (0, 1, 700, 701, 702, 703)] == [2, 3, 3, 4, 4, 5]
        assert file.text("tokenizer.chat_template") == "{{ messages }}"
        assert file.integer("tokenizer.ggml.eos_token_id") == 2


def test_what_llama_cpp_does_not_do_is_said_or_refused(tmp_path):
    report = convert(source_of(tmp_path / "nfkc", trained("nfkc")), tmp_path / "model.gguf")
    said = " ".join(report.notes)
    assert "does not normalize" in said and "runs of spaces" in said
    with pytest.raises(UnsupportedError, match="Unigram"):
        convert(source_of(tmp_path / "unigram", trained("unigram")), tmp_path / "no.gguf")
    model = ModelProto.FromString(trained())
    del model.pieces[200]
    with pytest.raises(UnsupportedError, match="no token for the byte <0xC5>"):
        convert(source_of(tmp_path / "byte", model.SerializeToString()), tmp_path / "no.gguf")


def test_all_fields_are_read_as_protobuf_reads_them():
    model = ModelProto.FromString(trained("gemma"))
    found = parse(model.SerializeToString())
    assert [(p.text, p.score, int(p.kind)) for p in found.pieces] == [
        (p.piece, p.score, p.type) for p in model.pieces
    ]
    assert found.special == {"unk": 3, "bos": 2, "eos": 1, "pad": 0}
    assert found.algorithm == "BPE" and not found.add_dummy_prefix
    model.trainer_spec.pad_id = -1
    model.trainer_spec.treat_whitespace_as_suffix = True
    model.normalizer_spec.escape_whitespaces = False
    found = parse(model.SerializeToString())
    assert found.special["pad"] == -1
    assert found.treat_whitespace_as_suffix and not found.escape_whitespaces


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no pieces"),
        (b"\x0a", "ends inside a number"),
        (b"\x0a\xff\xff\xff\xff\x0f", "claims 4294967295 bytes"),
        (b"\x0a" + b"\xff" * 11, "more than 64 bits"),
        (b"\x0b", "wire type 3"),
        (b"\x00\x00", "field number 0"),
        (b"\x08\x01", "a message or a text was wanted"),
        (b"\x0a\x00", "piece 0 without a text"),
        (b"\x0a\x04\x0a\x02\xff\xfe", "not UTF-8"),
        (b"\x0a\x08\x0a\x01a\x15\x00\x00\xc0\x7f", "score nan"),
        (b"\x0a\x05\x0a\x01a\x18\x07", "type 7, wanted 1 to 6"),
        (b"\x0a\x05\x0a\x01a\x10\x07", "float32 was wanted"),
        (b"\x0a\x06\x0a\x01a\x1a\x01x", "a number was wanted"),
    ],
)
def test_damaged_models(data, reason, tmp_path):
    with pytest.raises(WireError, match=reason):
        parse(data)
    source = source_of(tmp_path / "source", data)
    wanted = rf"tokenizer\.model is not a SentencePiece model.*{reason}"
    with pytest.raises(InputError, match=wanted):
        convert(source, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_mutations_end_in_a_model_or_one_error():
    chance, model = random.Random(0), trained()
    started = time.process_time()
    damaged = 0
    for _ in range(300):
        data = bytearray(model)
        for _ in range(chance.randrange(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            parse(bytes(data[: chance.randrange(1, len(data))]))
        except WireError:
            damaged += 1
    assert damaged > 100
    assert time.process_time() - started < 60, "no input takes forever"


def test_damaged_lists_of_added_tokens(tmp_path):
    for number, config in enumerate([
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"1": "a"}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}},
    ]):  # fmt: skip
        source = source_of(tmp_path / str(number), trained(), config)
        with pytest.raises(InputError, match=r"tokenizer_config\.json"):
            convert(source, tmp_path / "model.gguf")
