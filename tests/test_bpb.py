"""Bytes: the official figures on real validation text, and tables that lose nothing on any text."""

import json
import math

import numpy as np
import pytest
from conftest import unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

from golf import bpb
from golf.bpb import ByteTable, Score, bytes_of_documents, decoded_bytes, documents, windows
from golf.data import Corpus
from golf.errors import UsageError


@pytest.fixture(scope="module")
def table(corpus) -> ByteTable:
    return ByteTable(corpus / "tokenizer.model")


def test_official_figures_on_the_validation_head(yardstick):
    tokens = np.frombuffer(unpacked(yardstick / "fineweb_val_sp1024_prefix.bin.zst"), dtype="<u2", offset=1024)
    table = ByteTable(unpacked(yardstick / "tokenizers" / "fineweb_1024_bpe.model.zst"))
    assert (tokens.size - 1, table.count(tokens[:-1], tokens[1:])) == (1_040_297, 2_504_867)
    assert decoded_bytes(table, tokens) == 2_504_867
    whole = [t for _, t in windows(tokens, 1024, 37, whole_only=True)]
    targets = sum(t.size for t in whole)
    assert (targets, table.count(tokens[:targets], tokens[1 : targets + 1])) == (1_039_360, 2_502_627)
    texts = [json.loads(line)["text"] for line in unpacked(yardstick / "fineweb_val_prefix.jsonl.zst").splitlines()]
    assert [table.decode(d).decode() for d in documents(tokens, table.bos)] == texts
    assert table.encode(texts[5]) == list(documents(tokens, table.bos))[5].tolist()


def test_nine_published_tokenizers_count_as_recorded(yardstick):
    recorded = json.loads((yardstick.parent / "reference" / "token_counts.json").read_text())["tokenizers"]
    lines = unpacked(yardstick / "fineweb_docs_sample.jsonl.zst").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    for name, about in recorded.items():
        model = unpacked(yardstick / "tokenizers" / f"{name}.zst")
        if not about["byte_fallback"]:
            with pytest.raises(UsageError, match="byte fallback"):
                ByteTable(model)
            continue
        table = ByteTable(model)
        rows = [table.processor.encode(t) for t in texts]
        counted = sum(table.count(np.array([table.bos, *r[:-1]]), np.array(r)) for r in rows)
        assert (sum(map(len, rows)), counted) == (
            about["raw_sample"]["tokens_without_bos"], about["raw_sample"]["table_bytes"],
        )  # fmt: skip
        trips = sum(table.decode(r).decode() == t for r, t in zip(rows, texts, strict=True))
        assert trips == about["raw_sample"]["documents_round_trip"]


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)
NASTY = st.sampled_from(
    ["\u2581", " ", "  ", "\n", "\t", "\r\n", "\0", "<s>", "<0x41>", "<unk>", "\ufeff", "e\u0301", "\u00a0"]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(TEXT, NASTY), max_size=6).map("".join))
def test_any_text_round_trips_and_counts_its_bytes(corpus, text):
    table = ByteTable(corpus / "tokenizer.model")
    tokens = table.encode(text)
    assert table.decode(tokens) == text.encode()
    row = np.array([table.bos, *tokens])
    assert table.count(row[:-1], row[1:]) == len(text.encode())
    assert decoded_bytes(table, row) == len(text.encode())


def test_a_literal_lower_block_goes_out_as_its_three_bytes(table):
    tokens = table.encode("a\u2581b")
    assert [table.processor.id_to_piece(t) for t in tokens][1:4] == ["<0xE2>", "<0x96>", "<0x81>"]


def test_counts_agree_with_the_manifest_and_the_original_text(corpus, table):
    data = Corpus(corpus)
    tokens = np.concatenate(data.shards("val"))
    texts = [json.loads(line)["text"] for line in (corpus / "val.jsonl").read_text("utf-8").splitlines()]
    original = sum(len(t.encode()) for t in texts)
    counted = table.count(tokens[:-1], tokens[1:])
    assert counted == decoded_bytes(table, tokens) == original == data.manifest["splits"]["val"]["bytes"]
    assert [table.decode(d).decode() for d in documents(tokens, table.bos)] == texts


def test_unknown_pieces_are_refused(table):
    with pytest.raises(UsageError, match="unknown piece"):
        table.count(np.array([1]), np.array([table.unknown]))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UsageError, match="cannot be read"):
        ByteTable(path)
    path.write_bytes(b"not a model")
    with pytest.raises(UsageError, match="not a SentencePiece model"):
        ByteTable(path)


def test_a_tokenizer_without_the_bare_space_piece_is_refused(library_texts):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(w for d in library_texts[:20] for w in d.text.split()), model_writer=model, vocab_size=400,
        model_type="bpe", byte_fallback=True, add_dummy_prefix=False, normalization_rule_name="identity",
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(UsageError, match="bare space"):
        ByteTable(model.getvalue())


def test_a_space_that_the_tokenizer_adds_is_no_byte_of_the_text(library_texts, monkeypatch):
    """SentencePiece's default puts one before each document and takes it off again."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(d.text for d in library_texts[:60]), model_writer=model, vocab_size=500, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, required_chars="\u2581",
        minloglevel=2, max_sentence_length=1 << 28,
    )  # fmt: skip
    table = ByteTable(model.getvalue())
    assert table.drops_first_space
    bos, row, texts = table.bos, [], [d.text for d in library_texts[:60]] + ["x", " two", "\tthree", "end "]
    for text in texts:
        row += [bos, *table.encode(text)]
        assert table.decode(row[-len(table.encode(text)) :]).decode() == text
    tokens, size = np.array(row), sum(len(t.encode()) for t in texts)
    assert table.count(tokens[:-1], tokens[1:]) == decoded_bytes(table, tokens) == size
    assert table.sizes(tokens[:-1], tokens[1:]).sum() == size
    monkeypatch.setattr(bpb, "PART", 7)
    starts = np.flatnonzero(tokens == bos)
    assert bytes_of_documents(table, tokens, starts).tolist() == [len(t.encode()) for t in texts]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 400), st.integers(1, 60), st.integers(1, 9))
def test_windows_hold_every_target_once(size, length, rows):
    tokens = np.arange(size)
    parts = list(windows(tokens, length, rows))
    assert np.concatenate([t.flatten() for _, t in parts]).tolist() == list(range(1, size))
    assert np.concatenate([i.flatten() for i, _ in parts]).tolist() == list(range(size - 1))
    whole = [t for _, t in windows(tokens, length, rows, whole_only=True)]
    assert sum(t.size for t in whole) == (size - 1) // length * length


def test_bits_per_byte_is_nats_over_ln2_over_bytes():
    score = Score(nats=math.log(2) * 1000, tokens=400, bytes=2000)
    assert score.bpb == pytest.approx(0.5)
    assert score.loss == pytest.approx(math.log(2) * 2.5)
