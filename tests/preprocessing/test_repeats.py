"""No text stands in two splits, and with duplicates dropped none stands twice."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepare_runs import SENTENCE, TEXTS, Run

from brt_dist.data.token_shards import SPLITS
from brt_dist.data.tokenizer import Tokenizer
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.repeats import CONTENT, Repeats, content_hash, find_repeats

# Units of documents: a text, its split, and whether its corpus says so.
documents = st.tuples(st.sampled_from("abcde"), st.sampled_from(SPLITS), st.booleans())
units = st.lists(st.lists(documents, max_size=6), max_size=5)


def contents_of(unit: list[tuple[str, str, bool]]) -> np.ndarray:
    rows = [
        (*content_hash(text.encode()), number, SPLITS.index(split), given)
        for number, (text, split, given) in enumerate(unit)
    ]
    return np.array(rows, CONTENT)


@given(units=units)
def test_a_repeated_text_belongs_where_a_corpus_says_the_most_held_back_first_and_else_to_its_first_document(units):
    places = defaultdict(list)
    for unit, found in enumerate(units):
        for number, (text, split, said) in enumerate(found):
            places[text].append((-1 - SPLITS.index(split) if said else 0, unit, number, split))
    repeats = find_repeats([contents_of(unit) for unit in units])
    assert len(repeats) == sum(len(found) > 1 for found in places.values())
    for text in "abcde":
        found = repeats.find(content_hash(text.encode()))
        if len(places[text]) < 2:
            assert found is None
        else:
            _, unit, number, split = min(places[text])
            assert found == (split, (unit, number))


def test_texts_with_many_copies_are_held_back_no_more_often_than_others():
    draw = random.Random(0)
    texts = [f"text {number}" for number in range(3000) for _ in range(10)]
    splits = draw.choices(SPLITS, weights=(8, 1, 1), k=len(texts))
    repeats = find_repeats([contents_of([(text, split, False) for text, split in zip(texts, splits, strict=True)])])
    found = [repeats.find(content_hash(text.encode())) for text in set(texts)]
    assert sum(each is not None and each[0] == "train" for each in found) == pytest.approx(2400, abs=100)


def test_texts_whose_hashes_agree_in_one_half_are_told_apart():
    rows = [
        *((7, 1, 0, 0, False), (7, 2, 1, 0, False), (7, 2, 2, 2, True)),
        *((7, 3, 3, 1, False), (7, 3, 4, 0, False), (8, 3, 5, 0, False)),
    ]
    repeats = find_repeats([np.array(rows, CONTENT)])
    found = {(high, low): repeats.find((high, low)) for high, low, *_ in rows}
    assert found == {(7, 1): None, (7, 2): ("test", (0, 2)), (7, 3): ("validation", (0, 3)), (8, 3): None}


def test_a_saved_table_is_the_same_when_loaded(tmp_path: Path):
    units = [[("a", "train", False), ("b", "train", False)], [("b", "test", True), ("a", "train", False)]]
    repeats = find_repeats([contents_of(unit) for unit in units])
    repeats.save(tmp_path / "repeats.npy")
    loaded = Repeats.load(tmp_path / "repeats.npy")
    for text in "abc":
        assert loaded.find(content_hash(text.encode())) == repeats.find(content_hash(text.encode()))


@pytest.fixture
def doubled(run: Run) -> Run:
    """Two corpora; what stands in `again` stands in `texts` too, but for one document."""
    again = run.corpus.root.parent / "again"
    again.mkdir()
    for name, text in TEXTS.items():
        (again / f"copy-{name}").write_bytes(text.encode())
    (again / "another.txt").write_text(SENTENCE * 3 + "another")
    run.corpora = {"texts": run.corpus, "again": CorpusConfig(path=str(again))}
    return run


def texts_by_split(run: Run) -> dict[str, list[str]]:
    shards = run()
    tokenizer = Tokenizer.open(shards.tokenizer_path)
    found = {name: shards.split(name) for name in SPLITS}
    return {name: [tokenizer.decode(found[name].tokens(i)) for i in range(len(found[name]))] for name in SPLITS}


def test_without_dropping_all_are_there_and_no_text_is_in_two_splits(doubled: Run):
    by_split = texts_by_split(doubled)
    assert sum(map(len, by_split.values())) == 49
    splits_of = {text: {split for split in SPLITS if text in by_split[split]} for text in TEXTS.values()}
    assert {len(splits) for splits in splits_of.values()} == {1}
    manifest = json.loads(doubled.files()["manifest.json"])
    assert manifest["moved"]["duplicate"] > 3
    assert f"{manifest['moved']['duplicate']} documents went into the split of another one" in doubled.printed


def test_dropped_duplicates_are_counted_and_named_within_and_across_corpora(doubled: Run):
    (doubled.corpora["texts"].root / "99.txt").write_bytes(TEXTS["07.txt"].encode())
    doubled.documents = DocumentsConfig(duplicates="drop")
    by_split = texts_by_split(doubled)
    found = [text for texts in by_split.values() for text in texts]
    assert sorted(found) == sorted([*TEXTS.values(), SENTENCE * 3 + "another"])
    manifest = json.loads(doubled.files()["manifest.json"])
    assert manifest["skipped"]["duplicate"] == 25
    named = {entry["id"] for entry in manifest["skipped_documents"] if entry["why"] == "duplicate"}
    assert len(named) == 25
    kept = {entry["id"] for entry in manifest["sources"]}
    # Whichever copy is kept, the others are named.
    assert named | kept >= {f"texts/{name}" for name in TEXTS} | {f"again/copy-{name}" for name in TEXTS}
    assert not named & kept


def test_an_interrupted_run_still_knows_which_texts_are_repeated(doubled: Run):
    doubled.documents = DocumentsConfig(duplicates="drop")
    doubled()
    whole = doubled.files()
    (doubled.folder / "manifest.json").unlink()
    for name in ("shard-000003.arrow", "repeats.npy"):
        (doubled.folder / name).unlink()
    doubled()
    assert doubled.files() == whole
