"""`prepare` gives the same bytes every time, and names what is wrong with a corpus or a setting."""

from __future__ import annotations

import io
import json
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import sentencepiece
from prepare_runs import SENTENCE, TEXTS, Run
from rich.console import Console

from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import TokenShards
from brt_dist.data.tokenizer import Tokenizer
from preprocessing import prepare as prepare_module
from preprocessing.config import CorpusConfig, DocumentsConfig, ShardsConfig, SplitsConfig, TokenizerConfig
from preprocessing.manifest import REASONS
from preprocessing.repeats import find_repeats
from preprocessing.report import Progress, Reporter
from preprocessing.shard_unit import Recipe, write_unit
from preprocessing.units import Part, Unit


def decoded(shards: TokenShards) -> dict[str, str]:
    documents, tokenizer = shards.split("all"), Tokenizer.open(shards.tokenizer_path)
    return {name: tokenizer.decode(documents.tokens(index)) for index, name in enumerate(documents.ids)}


def test_every_document_comes_back_from_its_shard(run: Run) -> None:
    shards = run()
    assert decoded(shards) == TEXTS
    documents = shards.split("all")
    assert documents.bytes.tolist() == [len(text.encode()) for text in TEXTS.values()]
    assert documents.words.tolist() == [len(text.split()) for text in TEXTS.values()]
    assert len(shards.manifest["shards"]) > 3


def test_the_manifest_counts_what_the_shards_hold(run: Run) -> None:
    shards = run()
    for name in ("train", "validation", "test"):
        documents, counts = shards.split(name), shards.manifest["splits"][name]
        assert len(documents) > 0
        assert counts == {
            "documents": len(documents),
            "tokens": documents.lengths.sum(),
            "bytes": documents.bytes.sum(),
        }
    manifest = shards.manifest
    assert [entry["id"] for entry in manifest["sources"]] == shards.split("all").ids
    assert manifest["tokens"] == shards.split("all").lengths.sum()
    assert manifest["vocab_size"] == shards.vocab_size == 330
    assert manifest["tokenizer"]["lossless"] is True
    assert shards.split("all").lengths.sum() > 0
    assert all(shards.eos not in shards.split("all").tokens(index) for index in range(24))


def test_another_run_elsewhere_with_more_threads_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    run()
    before = run.files()
    run.folder = tmp_path / "elsewhere"
    run.shards = ShardsConfig(dir=str(run.folder), unit_bytes=5000)
    run(threads=3)
    assert run.files() == before


def test_what_the_exclude_setting_leaves_out_is_counted(run: Run) -> None:
    run.corpus = CorpusConfig(path=run.corpus.path, exclude=("1*.txt", "cache", "*.bin"))
    (run.corpus.root / "other.bin").write_bytes(b"no match of the pattern anyway")
    run()
    assert "10 files left out by corpus.exclude\n" in run.printed
    (run.corpus.root / "cache").mkdir()
    run()
    assert "1 folder and 10 files left out by corpus.exclude\n" in run.printed
    run.corpus = CorpusConfig(path=run.corpus.path)
    run.shards = ShardsConfig(dir=f"{run.shards.dir}-2", unit_bytes=5000)
    run()
    assert "left out by" not in run.printed


@pytest.mark.parametrize(("policy", "kept"), [("skip", 24), ("replace", 25)])
def test_a_document_that_is_not_utf8_is_counted_named_and_treated_as_told(run: Run, policy, kept: int) -> None:
    (run.corpus.root / "bad.txt").write_bytes(b"caf\xe9 " + SENTENCE.encode())
    (run.corpus.root / "empty.txt").write_bytes(b"")
    run.documents = DocumentsConfig(policy)
    shards = run()
    manifest = shards.manifest
    named = [{"id": "bad.txt", "source": "bad.txt, byte offset 3", "why": "invalid_utf8"}]
    empty = [{"id": "empty.txt", "source": "empty.txt", "why": "empty"}]
    assert manifest["documents"] == kept
    assert manifest["skipped"] == dict.fromkeys(REASONS, 0) | {"invalid_utf8": 25 - kept, "empty": 1}
    assert manifest["replaced"] == {"invalid_utf8": kept - 24}
    assert manifest["skipped_documents"] == (named if policy == "skip" else []) + empty
    assert manifest["replaced_documents"] == ([] if policy == "skip" else named)
    assert "bad.txt, byte offset 3" in run.printed
    if policy == "replace":
        assert decoded(shards)["bad.txt"] == "caf\ufffd " + SENTENCE


def test_a_document_that_is_not_utf8_ends_the_run_by_default_and_binds_the_folder_to_nothing(run: Run) -> None:
    (run.corpus.root / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match=r"'bad\.txt' is not valid UTF-8 at bad\.txt, byte offset 3"):
        run()
    assert not run.folder.exists()
    run.documents = DocumentsConfig("skip")
    assert run().manifest["skipped"]["invalid_utf8"] == 1


def test_a_single_empty_file_is_an_empty_corpus_in_plain_words(run: Run) -> None:
    (run.corpus.root / "01.txt").write_bytes(b"")
    run.corpus = CorpusConfig(path=str(run.corpus.root / "01.txt"))
    with pytest.raises(
        BadInput, match=r"corpus is empty: the only document of .*/01\.txt is empty or not valid UTF-8$"
    ):
        run()


def test_a_single_document_that_is_held_back_leaves_nothing_to_train_on(run: Run) -> None:
    run.corpus = CorpusConfig(path=str(run.corpus.root / "01.txt"))
    run.splits = SplitsConfig(0.999999, 0.0)
    with pytest.raises(BadInput, match=r"the only text, .*/01\.txt, does not fall into the train split"):
        run()


def test_a_corpus_of_empty_documents_is_empty(run: Run) -> None:
    for path in run.corpus.root.iterdir():
        path.write_bytes(b"")
    with pytest.raises(BadInput, match=r"corpus is empty: all 24 documents of .*corpus \(pattern '\*\.txt'\)"):
        run()


def test_two_documents_with_one_id_are_named_with_both_sources(run: Run) -> None:
    lines = [json.dumps({"id": number % 30, "text": SENTENCE}) + "\n" for number in range(31)]
    (run.corpus.root / "a.jsonl").write_text("".join(lines[:20]))
    (run.corpus.root / "b.jsonl").write_text("".join(lines[20:]))
    run.corpus = CorpusConfig(reader="jsonl", path=str(run.corpus.root))
    place = sum(map(len, lines[20:30]))
    with pytest.raises(BadInput, match=rf"two documents have the id '0': a\.jsonl@0 and b\.jsonl@{place}"):
        run()


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks of text that a tokenizer is trained on, once it is."""
    seen: list[str] = []
    train = prepare_module.train_tokenizer

    def watching(blocks: list[str], *rest: object) -> bytes:
        seen.extend(blocks)
        return train(blocks, *rest)

    monkeypatch.setattr(prepare_module, "train_tokenizer", watching)
    return seen


def test_the_tokenizer_sees_every_training_document_and_no_held_back_one(run: Run, sample: list[str]) -> None:
    shards = run()
    texts = decoded(shards)
    assert sorted(sample) == sorted(texts[name] for name in shards.split("train").ids)


def test_a_small_sample_keeps_to_its_size_and_is_spread_over_the_corpus(run: Run, sample: list[str]) -> None:
    run.tokenizer = TokenizerConfig(vocab_size=310, sample_bytes=9000)
    run()
    assert 0 < sum(len(block.encode()) for block in sample) <= 9000
    assert len({block.split()[0] for block in sample}) > 2


def test_a_tokenizer_that_is_brought_along_encodes_the_corpus_and_goes_with_it(run: Run, tmp_path: Path) -> None:
    first = run()
    run.tokenizer = TokenizerConfig(model=str(first.tokenizer_path))
    run.shards = ShardsConfig(dir=str(tmp_path / "second"))
    second = run()
    assert second.tokenizer_path.read_bytes() == first.tokenizer_path.read_bytes()
    assert second.tokenizer_path.parent == tmp_path / "second"
    assert (second.vocab_size, second.manifest["tokenizer"]["lossless"]) == (330, True)
    assert decoded(second) == TEXTS
    run.tokenizer = TokenizerConfig(model=str(first.tokenizer_path), vocab_size=500)
    run.shards = ShardsConfig(dir=str(tmp_path / "third"))
    with pytest.raises(BadInput, match=r"vocab_size is 500, but .*tokenizer\.model has 330 pieces"):
        run()


def test_a_lossy_tokenizer_that_is_brought_along_is_called_lossy(run: Run, tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS.values()), model_writer=model, vocab_size=40, minloglevel=2
    )
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    run.tokenizer = TokenizerConfig(model=str(tmp_path / "lossy.model"))
    run.check_round_trip = True
    tokenizer = run().manifest["tokenizer"]
    assert (tokenizer["lossless"], tokenizer["inexact_documents"]) == (False, 24)
    assert "not lossless: 24 documents" in run.printed


def test_the_shard_folder_is_no_part_of_a_corpus_that_surrounds_it(run: Run) -> None:
    run.folder = run.corpus.root / "shards"
    run.shards = ShardsConfig(dir=str(run.folder), unit_bytes=5000)
    run.corpus = CorpusConfig(path=run.corpus.path)
    run()
    run()
    assert "nothing to do" in run.printed


def test_the_manifest_names_no_time_and_no_place_on_this_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder.parent)
    run.corpus = CorpusConfig(path="corpus/*.txt")
    run()
    for name in ("manifest.json", "units.jsonl"):
        text = run.files()[name].decode()
        assert str(run.folder.parent) not in text
        assert "time" not in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CorpusConfig(reader="csv"), r"corpus\.reader must be files, .* or huggingface, not 'csv'"),
        (lambda: CorpusConfig(exclude="test"), r"corpus\.exclude must be a list"),
        (lambda: DocumentsConfig("ignore"), r"documents\.invalid_utf8 must be .* not 'ignore'"),
        (lambda: SplitsConfig(0.6, 0.5), r"validation 0\.6 and splits\.test 0\.5 .* together 1\.1"),
        (lambda: SplitsConfig(-0.1), r"splits\.validation .* not -0\.1"),
        (lambda: TokenizerConfig(vocab_size=0), r"vocab_size must be at least 1, not 0"),
        (lambda: ShardsConfig(unit_bytes=0), r"unit_bytes must be at least 1, not 0"),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_its_value(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_long_documents_one_after_the_other_need_memory_for_one(
    run: Run, kind: Literal["bytes", "bpe"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes for each character that stands for four in memory: what lets documents of 128 MiB fit into 2 GiB."""
    run.tokenizer = TokenizerConfig(kind=kind, vocab_size=330 if kind == "bpe" else 260)
    run.check_round_trip = True
    run()
    characters = 2_000_000
    for number in range(3):
        text = (SENTENCE + f"{number}\n") * (characters // len(SENTENCE)) + "\U0001f600"
        (run.corpus.root / f"{number}.long").write_text(text)
        size = len(text.encode())
    unit = Unit(0, "", tuple(Part(f"{number}.long", 0, size, size, str(number)) for number in range(3)))
    tokenizer = Tokenizer.open(run.folder / "tokenizer.model")
    recipe = Recipe({"": run.corpus}, run.documents, run.splits, tokenizer, find_repeats([]), check_all=True)
    monkeypatch.setattr("brt_dist.data.token_shards._BATCH_TOKENS", 1)
    tracemalloc.start()
    try:
        write_unit(unit, recipe, run.folder, lambda news: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / characters < 13


def test_the_summary_cuts_no_figure_where_nobody_says_how_wide_it_may_be(run: Run) -> None:
    run()
    text = io.StringIO()
    reporter = Reporter(Console(file=text))
    shards = TokenShards.open(run.folder)
    reporter.summary(shards.manifest, {"corpus": np.full(5, 123_456_789_012)})
    assert "…" not in text.getvalue()
    assert text.getvalue().count("123,456,789,012") == 5


def test_a_narrow_terminal_still_shows_the_time_that_is_left() -> None:
    text = io.StringIO()
    size = 123_456_789_012
    with Reporter(Console(file=text, force_terminal=True, width=80)).steps("encoding", {"books": size}) as steps:
        for _ in range(3):
            steps.advance(Progress("books", size // 4, 1_234_567, size // 8))
            time.sleep(0.15)
    assert re.search(r"encoding books.*\d:\d\d:\d\d.*MB", text.getvalue())
