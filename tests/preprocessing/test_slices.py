"""A compressed file is read in slices by several ranks: together they give what one reader gives."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pytest
from corpus_files import EVERYTHING, LENIENT, contents, left_out, listed, read_one

from preprocessing.config import CorpusConfig
from preprocessing.readers import jsonl

DRAW = random.Random(0)
LINES = [
    json.dumps({"id": number, "text": "".join(DRAW.choices("abcdefghij ", k=number * 7 % 400))}) + "\n"
    for number in range(400)
]
TEXT = "".join(LINES).encode()


@pytest.fixture(params=["gz", "zst"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    """A compressed file, with stretches that are shorter than some of its lines."""
    monkeypatch.setattr(jsonl, "_STRETCH", 200)
    compressed = gzip.compress(TEXT) if request.param == "gz" else pa.compress(TEXT, "zstd", asbytes=True)
    path = tmp_path / f"a.jsonl.{request.param}"
    path.write_bytes(compressed)
    return CorpusConfig(reader="jsonl", path=str(path))


def test_slices_give_every_line_once_with_the_ids_of_the_whole(corpus: CorpusConfig):
    whole = contents(corpus, EVERYTHING)
    assert len(whole) == len(LINES)
    size = Path(corpus.path).stat().st_size
    for unit_bytes, slices in ((size, 1), (size // 3, 3), (1, 4)):
        units = listed(corpus, unit_bytes)
        assert len(units) == slices
        assert units.size == size
        sliced = contents(corpus, unit_bytes)
        assert sliced == whole
        by_slice = [len(list(read_one(corpus, unit))) for unit in units]
        assert sum(by_slice) == len(LINES)
        assert min(by_slice) > len(LINES) / slices / 2


def test_what_is_left_out_of_a_slice_is_named_once_and_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jsonl, "_STRETCH", 200)
    bad = TEXT.replace(b'{"id": 33,', b'{"id" 33,')
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(bad)[:-3000])
    corpus = CorpusConfig(reader="jsonl", path=str(path))
    expected = [(one.id, one.source, one.why) for one in left_out(corpus, LENIENT)]
    assert len(expected) == 2
    sliced = [(one.id, one.source, one.why) for one in left_out(corpus, LENIENT, 1)]
    assert sorted(sliced) == sorted(expected)
    assert contents(corpus, 1, LENIENT) == contents(corpus, EVERYTHING, LENIENT)
