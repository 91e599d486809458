"""The tokenizer loses nothing, and neither chunks nor threads change its tokens."""

from __future__ import annotations

import inspect
import io
import json.decoder
import textwrap

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from brt_dist.data.errors import BadInput
from brt_dist.data.tokenizer import HARD_TEXTS, SPACE_MARK, Tokenizer, byte_tokenizer, line_chunks, train_tokenizer

PROSE = inspect.getsource(textwrap) + inspect.getsource(json.decoder)
VOCAB_SIZE = 600

nasty_text = st.lists(
    st.sampled_from(
        ["\n", "\n\n", "\t", " ", "  ", "\r\n", "\x00", SPACE_MARK, "\ufeff", "def ", "self", "é", "</s>", "😀"]
    )
).map("".join)


def blocks() -> list[str]:
    return list(line_chunks(PROSE, 2000))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(blocks(), "bpe", VOCAB_SIZE))


@pytest.fixture(scope="module")
def lossy_model() -> bytes:
    """A model with sentencepiece's own defaults: it normalises, and takes white space away."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()), model_writer=model, vocab_size=300, minloglevel=2
    )
    return model.getvalue()


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_a_hard_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text() | nasty_text)
@settings(deadline=None, max_examples=300)
def test_any_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_unigram_model_is_lossless_too() -> None:
    model = Tokenizer(train_tokenizer(blocks(), "unigram", VOCAB_SIZE))
    assert all(model.is_exact(text) for text in HARD_TEXTS)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_a_vocabulary_of_bytes_has_the_bytes_behind_three_special_ids(text: str) -> None:
    model = byte_tokenizer()
    ours, plain = Tokenizer(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (ours.vocab_size, ours.eos) == (260, 1)
    assert ours.encode(text).tolist() == [3 + byte for byte in text.encode()] == plain.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_only_a_model_of_nothing_but_bytes_is_taken_for_one(tokenizer: Tokenizer) -> None:
    """The trained one has byte pieces too, for what it does not know."""
    assert len(tokenizer.encode("def self")) < 8
    assert tokenizer.encode("\U0010ffff").tolist() != [3 + byte for byte in "\U0010ffff".encode()]


def test_a_line_of_many_megabytes_comes_back_from_its_tokens(tokenizer: Tokenizer) -> None:
    text = "0123456789 abc" * 700_000 + "\nend"
    assert tokenizer.is_exact(text)


def test_a_plain_sentencepiece_decoder_gives_the_space_mark_back() -> None:
    model = train_tokenizer(blocks(), "bpe", VOCAB_SIZE)
    text = f"a {SPACE_MARK}{SPACE_MARK}b\n"
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert plain.decode(Tokenizer(model).encode(text).tolist()) == text
    assert plain.decode(plain.encode(text)) != text


@given(text=nasty_text, size=st.integers(1, 20))
@settings(deadline=None, max_examples=300)
def test_chunks_of_lines_have_the_tokens_of_the_whole_text(tokenizer: Tokenizer, text: str, size: int) -> None:
    chunks = [tokenizer.encode(chunk) for chunk in line_chunks(text, size)]
    assert np.concatenate([np.zeros(0, np.int32), *chunks]).tolist() == tokenizer.encode(text).tolist()


def test_a_long_document_has_the_tokens_that_sentencepiece_gives_the_whole_of_it() -> None:
    model = train_tokenizer(blocks(), "bpe", VOCAB_SIZE)
    text = (PROSE + "\n" * 5000 + "one long line " * 1000) * 2
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert Tokenizer(model).encode(text).tolist() == plain.encode(text)


@given(text=nasty_text, size=st.integers(1, 20))
def test_line_chunks_lose_nothing_and_end_with_newlines(text: str, size: int) -> None:
    chunks = list(line_chunks(text, size))
    assert "".join(chunks) == text
    assert all(chunk.endswith("\n") for chunk in chunks[:-1])
    assert all(len(chunk) <= size or "\n" not in chunk[:-1] for chunk in chunks)


def test_the_number_of_threads_changes_no_token(tokenizer: Tokenizer) -> None:
    texts = [PROSE, "", SPACE_MARK, PROSE[1000:9000]]
    one, three = tokenizer.encode_all(texts, threads=1), tokenizer.encode_all(texts, threads=3)
    assert [tokens.tolist() for tokens in one] == [tokens.tolist() for tokens in three]
    assert len(one[1]) == 0


def test_the_same_sample_trains_the_same_file() -> None:
    assert train_tokenizer(blocks(), "bpe", VOCAB_SIZE) == train_tokenizer(blocks(), "bpe", VOCAB_SIZE)


def test_no_text_encodes_to_the_end_of_sentence(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(PROSE + "</s><unk>")
    assert tokenizer.eos not in tokens
    assert tokens.max() < tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.decode([tokenizer.eos, *tokenizer.encode("ab"), tokenizer.eos]) == "ab"


def test_a_vocabulary_too_large_for_the_text_is_named_with_both_numbers() -> None:
    with pytest.raises(BadInput, match=r"vocab_size 50000 is too large .* at most \d+ pieces"):
        train_tokenizer(blocks(), "bpe", 50000)


def test_a_vocabulary_too_small_for_single_bytes_is_named_with_both_numbers() -> None:
    with pytest.raises(BadInput, match=r"vocab_size 100 is too small.* \d+"):
        train_tokenizer(blocks(), "bpe", 100)


def test_nothing_to_train_on_is_bad_input() -> None:
    with pytest.raises(BadInput, match="no text"):
        train_tokenizer([], "bpe", 300)


def test_a_file_that_is_no_model_is_named(tmp_path) -> None:
    (tmp_path / "noise.model").write_bytes(b"noise")
    with pytest.raises(BadInput, match=r"noise\.model is not a sentencepiece model"):
        Tokenizer.open(tmp_path / "noise.model")
    with pytest.raises(BadInput, match=r"absent\.model cannot be read"):
        Tokenizer.open(tmp_path / "absent.model")


def test_a_lossy_model_is_seen_to_be_lossy_and_its_texts_are_not_cut(lossy_model: bytes) -> None:
    model = Tokenizer(lossy_model)
    assert not model.is_exact("a  b")
    plain = sentencepiece.SentencePieceProcessor(model_proto=lossy_model)
    assert model.encode(PROSE).tolist() == plain.encode(PROSE)


@pytest.fixture(scope="module")
def prefixing_model() -> bytes:
    """A lossless model that adds a space in front of a text, as Llama's does."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("text", [*HARD_TEXTS, PROSE, "\n".join(HARD_TEXTS) * 20])
def test_a_model_that_adds_a_space_in_front_gives_a_cut_text_back(prefixing_model: bytes, text: str) -> None:
    assert Tokenizer(prefixing_model).is_exact(text)


def test_a_model_that_adds_a_space_in_front_has_the_tokens_of_the_whole_in_small_pieces(prefixing_model: bytes) -> None:
    """A whole document in one call would need some forty bytes of memory for each character."""
    model = Tokenizer(prefixing_model)
    text = PROSE + "  two\n\n  lines\n" * 100
    plain = sentencepiece.SentencePieceProcessor(model_proto=prefixing_model)
    assert model.encode(text).tolist() == plain.encode(text)
    assert max(map(len, model._cut(text))) < len(text) / 2


@pytest.mark.parametrize("together", [1, 2, 7, 50])
def test_parts_of_tokens_decode_to_the_text_of_the_whole(
    tokenizer: Tokenizer, lossy_model: bytes, prefixing_model: bytes, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brt_dist.data.tokenizer._DECODED_TOGETHER", together)
    text = "  two \U0001f468\u200d\U0001f469 words\n é\u2581 " * 3
    for model in (tokenizer, Tokenizer(byte_tokenizer()), Tokenizer(lossy_model), Tokenizer(prefixing_model)):
        tokens = model.encode(text)
        parts = list(model.decode_parts(tokens))
        assert len(parts) >= len(tokens) / (together + 4)
        assert "".join(parts) == model._processor.decode(tokens.tolist())
