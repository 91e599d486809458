"""Bytes that are not UTF-8 are found, named and treated as told; splits depend on the id alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brt_dist.data.errors import BadInput
from brt_dist.data.splits import split_of
from preprocessing.documents import Document, decode, printable_name

BAD = Document("top", "top", b"good\nb\xff\xfed", ((0, "top/a.txt"), (5, "top/b.txt")))


@given(text=st.text(min_size=1))
def test_a_valid_document_is_its_text_under_every_policy(text: str) -> None:
    for policy in ("skip", "replace", "fatal"):
        decoded = decode(Document("id", "source", text.encode()), policy)
        assert (decoded.text, decoded.why) == (text, None)


def test_a_document_with_bad_bytes_is_left_out_under_skip() -> None:
    decoded = decode(BAD, "skip")
    assert (decoded.text, decoded.why, decoded.place) == (None, "invalid_utf8", "top/b.txt, byte offset 1")


def test_bad_bytes_become_replacement_characters_under_replace_and_nothing_else_changes() -> None:
    decoded = decode(BAD, "replace")
    assert (decoded.text, decoded.why) == ("good\nb\ufffd\ufffdd", "invalid_utf8")


def test_bad_bytes_end_the_run_under_fatal_naming_document_file_and_byte() -> None:
    with pytest.raises(BadInput, match=r"document 'top' .* top/b\.txt, byte offset 1"):
        decode(BAD, "fatal")


def test_an_empty_document_is_left_out_even_under_fatal() -> None:
    assert decode(Document("id", "source", b""), "fatal").why == "empty"


@given(raw=st.binary())
def test_a_printable_name_can_always_be_written(raw: bytes) -> None:
    name = raw.decode("utf-8", "surrogateescape")
    printed = printable_name(name)
    assert printed.encode().decode("utf-8", "strict") == printed
    assert printed == name or any("\udc80" <= sign <= "\udcff" for sign in name)
    assert printable_name(raw.decode("latin-1")) == raw.decode("latin-1")


@pytest.mark.parametrize("fractions", [(0.1, 0.1), (0.3, 0.0), (0.0, 0.25)])
def test_splits_get_their_fractions_of_many_documents(fractions: tuple[float, float]) -> None:
    splits = [split_of(f"document {number}", *fractions) for number in range(20000)]
    assert splits.count("validation") / 20000 == pytest.approx(fractions[0], abs=0.01)
    assert splits.count("test") / 20000 == pytest.approx(fractions[1], abs=0.01)


def test_the_split_of_an_id_never_changes() -> None:
    ids = ["a.py", "json", "books/moby-dick.txt", "é"]
    assert [split_of(name, 0.4, 0.3) for name in ids] == ["test", "validation", "validation", "train"]


def test_a_larger_validation_fraction_keeps_the_documents_it_had() -> None:
    for number in range(2000):
        if split_of(str(number), 0.1, 0.0) == "validation":
            assert split_of(str(number), 0.2, 0.0) == "validation"
