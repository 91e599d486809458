"""`prepare` gives the same bytes every time, takes up where it stopped, and never overwrites other work."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from rich.console import Console

from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import TokenShards
from brt_dist.data.tokenizer import SPACE_MARK, Tokenizer
from preprocessing import prepare as prepare_module
from preprocessing.config import CorpusConfig, DocumentsConfig, ShardsConfig, SplitsConfig, TokenizerConfig
from preprocessing.ledger import Ledger
from preprocessing.prepare import prepare
from preprocessing.report import Reporter
from preprocessing.shard_unit import write_unit
from preprocessing.units import Unit

SENTENCE = "The quick brown fox jumps over the lazy dog;\tpack my box with\r\n  five dozen liquor jugs. "
TEXTS = {f"{number:02}.txt": f"{number} {SPACE_MARK} " + SENTENCE * number + "\n" for number in range(1, 25)}


class Run:
    """One `prepare` of a folder of text files, with settings that a test can change."""

    def __init__(self, folder: Path):
        self.corpus = CorpusConfig(path=str(folder / "corpus" / "*.txt"))
        self.documents = DocumentsConfig()
        self.tokenizer = TokenizerConfig(vocab_size=330)
        self.splits = SplitsConfig(0.2, 0.2)
        self.shards = ShardsConfig(dir=str(folder / "shards"), unit_bytes=5000)
        self.folder = folder / "shards"
        self.printed = ""

    def __call__(self, threads: int = 1) -> TokenShards:
        text = io.StringIO()
        try:
            parts = (self.corpus, self.documents, self.tokenizer, self.splits, self.shards)
            path = prepare(*parts, threads=threads, reporter=Reporter(Console(file=text, width=100)))
        finally:
            self.printed = text.getvalue()
        return TokenShards.open(path.parent)

    def files(self) -> dict[str, bytes]:
        """Every file of the shard folder with its content."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir()} if self.folder.exists() else {}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "corpus").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "corpus" / name).write_bytes(text.encode())
    return Run(tmp_path)


def decoded(shards: TokenShards) -> dict[str, str]:
    documents, tokenizer = shards.split("all"), Tokenizer.open(shards.tokenizer_path)
    return {name: tokenizer.decode(documents.tokens(index)) for index, name in enumerate(documents.ids)}


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int) -> list[int]:
    """Make `prepare` die in the unit after `units`; the list gets the number of each unit that is begun."""
    begun: list[int] = []

    def dying(unit: Unit, *rest: object) -> object:
        begun.append(unit.number)
        if len(begun) > units:
            raise KeyboardInterrupt
        return write_unit(unit, *rest)

    monkeypatch.setattr(prepare_module, "write_unit", dying)
    return begun


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


def test_a_corpus_that_was_moved_gives_the_same_manifest_and_is_not_refused(run: Run, tmp_path: Path) -> None:
    run()
    before = run.files()
    run.corpus.root.rename(tmp_path / "moved")
    run.corpus = CorpusConfig(path=str(tmp_path / "moved" / "*.txt"))
    run()
    assert "nothing to do" in run.printed
    run.folder = tmp_path / "elsewhere"
    run.shards = ShardsConfig(dir=str(run.folder), unit_bytes=5000)
    run()
    assert run.files() == before
    assert str(tmp_path) not in before["manifest.json"].decode()


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


def test_a_finished_run_started_again_does_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    before = {path: path.stat().st_mtime_ns for path in run.folder.iterdir()}
    begun = stop_after(monkeypatch, 0)
    run()
    assert "nothing to do" in run.printed
    assert begun == []
    assert {path: path.stat().st_mtime_ns for path in run.folder.iterdir()} == before


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bytes(run: Run, tmp_path: Path) -> None:
    run()
    whole = run.files()
    run.folder = tmp_path / "stopped"
    run.shards = ShardsConfig(dir=str(run.folder), unit_bytes=5000)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, 2)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert "manifest.json" not in run.files()
    with pytest.MonkeyPatch.context() as monkeypatch:
        begun = stop_after(monkeypatch, 1000)
        run()
    assert begun == list(range(2, len(json.loads(whole["manifest.json"])["shards"])))
    assert "2 of" in run.printed
    assert run.files() == whole


def test_a_ledger_line_cut_short_by_a_crash_counts_as_not_written(run: Run) -> None:
    run()
    whole = run.files()
    (run.folder / "manifest.json").unlink()
    (run.folder / "units.jsonl").write_bytes(whole["units.jsonl"][:-30])
    (run.folder / ".shard-000001.arrow.1.part").write_bytes(b"left by a crash")
    run()
    assert run.files() == whole


@pytest.mark.parametrize("name", ["shard-000001.arrow", "tokenizer.model"])
def test_a_file_with_one_flipped_byte_is_noticed_and_written_again(run: Run, name: str) -> None:
    run()
    whole = run.files()
    content = bytearray(whole[name])
    content[len(content) // 2] ^= 1
    (run.folder / name).write_bytes(content)
    run()
    assert f"{name} was altered" in run.printed
    assert {name: run.files()[name] for name in whole if name != "units.jsonl"} == {
        name: content for name, content in whole.items() if name != "units.jsonl"
    }
    run()
    assert "nothing to do" in run.printed


def test_a_damaged_folder_without_a_ledger_is_refused_with_advice_that_helps(run: Run) -> None:
    run()
    whole = run.files()
    (run.folder / "units.jsonl").unlink()
    (run.folder / "shard-000001.arrow").write_bytes(b"short")
    with pytest.raises(BadInput, match=r"shard-000001\.arrow is truncated.*\(remove the folder .*shards and run"):
        run()
    shutil.rmtree(run.folder)
    run()
    assert run.files() == whole


@pytest.mark.parametrize("content", [b'{"format": 1, "vocab', b"{}", b'{"format": 1, "hash": "0"}'])
def test_a_spoilt_manifest_can_be_removed_and_is_written_again_from_the_finished_shards(
    run: Run, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    whole = run.files()
    (run.folder / "manifest.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"manifest\.json .*\(remove it and run `brt prepare` again"):
        run()
    (run.folder / "manifest.json").unlink()
    begun = stop_after(monkeypatch, 0)
    run()
    assert begun == []
    assert run.files() == whole


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_lost_from_a_finished_folder_is_written_again(run: Run, damage: str) -> None:
    run()
    whole = run.files()
    shard = run.folder / "shard-000001.arrow"
    shard.unlink() if damage == "missing" else shard.write_bytes(b"short")
    run()
    assert "shard-000001.arrow" in run.printed
    assert {name: run.files()[name] for name in whole if name != "units.jsonl"} == {
        name: content for name, content in whole.items() if name != "units.jsonl"
    }


def change_vocabulary(run: Run) -> str:
    run.tokenizer = TokenizerConfig(vocab_size=340)
    return r"tokenizer\.vocab_size is 330 there and 340 here"


def change_splits(run: Run) -> str:
    run.splits = SplitsConfig(0.3, 0.2)
    return r"splits\.validation is 0\.2 there and 0\.3 here"


def add_a_file(run: Run) -> str:
    (run.corpus.root / "new.txt").write_text("new")
    size = sum(len(text.encode()) for text in TEXTS.values())
    return rf"its files differ, corpus_files has 24 files of {size} bytes there and 25 files of {size + 3} bytes here"


def rename_a_file(run: Run) -> str:
    (run.corpus.root / "01.txt").rename(run.corpus.root / "00.txt")
    return r"corpus_files has 24 files of \d+ bytes there and here, but their names, or the sizes of some, differ"


@pytest.mark.parametrize("change", [change_vocabulary, change_splits, add_a_file, rename_a_file])
@pytest.mark.parametrize("finished", [True, False])
def test_the_shards_of_other_settings_are_never_overwritten(
    run: Run, change: Callable[[Run], str], finished: bool
) -> None:
    run()
    if not finished:
        (run.folder / "manifest.json").unlink()
    before = run.files()
    message = change(run)
    with pytest.raises(BadInput, match=rf"shards holds shards of (other settings|another corpus): {message}"):
        run()
    assert run.files() == before


def test_shards_that_nothing_tells_of_are_never_overwritten(run: Run) -> None:
    run.folder.mkdir()
    (run.folder / "shard-000000.arrow").write_bytes(b"precious")
    with pytest.raises(BadInput, match=r"holds shard-000000\.arrow, but neither"):
        run()
    assert run.files() == {"shard-000000.arrow": b"precious"}


def test_two_runs_do_not_write_to_one_folder_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        run()
    settings = json.loads(run.files()["units.jsonl"].splitlines()[0])["settings"]
    with Ledger.open(run.folder, settings), pytest.raises(BadInput, match="another `brt prepare`"):
        run()


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
    assert manifest["skipped"] == {"invalid_utf8": 25 - kept, "empty": 1}
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
    with pytest.raises(BadInput, match=r"the only document of .*/01\.txt does not fall into the train split"):
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
        (lambda: CorpusConfig(reader="csv"), r"corpus\.reader must be files, jsonl or parquet, not 'csv'"),
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
