"""`prepare` takes up where it stopped, mends what was damaged, and never overwrites other work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from prepare_runs import TEXTS, Run, stop_after

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, ShardsConfig, SplitsConfig, TokenizerConfig
from preprocessing.ledger import Ledger
from preprocessing.manifest import make_manifest


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


def test_a_finished_run_started_again_does_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    before = {path: path.stat().st_mtime_ns for path in run.folder.iterdir()}
    begun = stop_after(monkeypatch, 0)
    run()
    assert "nothing to do" in run.printed
    assert begun == []
    assert {path: path.stat().st_mtime_ns for path in run.folder.iterdir()} == before


def test_a_finished_run_is_encoded_once_more_where_every_document_is_to_be_decoded_again(run: Run) -> None:
    run()
    before = run.files()
    assert json.loads(before["manifest.json"])["tokenizer"]["checked_documents"] < len(TEXTS)
    run.check_round_trip = True
    run()
    after = run.files()
    assert json.loads(after["manifest.json"])["tokenizer"]["checked_documents"] == len(TEXTS)
    shards = [name for name in before if name.endswith(".arrow")]
    assert {name: after[name] for name in shards} == {name: before[name] for name in shards}
    run()
    assert "nothing to do" in run.printed


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
    assert f"{name} was altered" in run.printed.replace("\n", "")
    assert run.files() == whole
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
    assert run.files() == whole


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
    with Ledger(run.folder, settings).held(), pytest.raises(BadInput, match="another `brt prepare`"):
        run()


def test_the_folder_is_held_until_the_manifest_is_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger is put in order before: another file then has its name."""
    settings: list[dict[str, object]] = []

    def late(*parts: object) -> dict[str, object]:
        settings.append(json.loads(run.files()["units.jsonl"].splitlines()[0])["settings"])
        with pytest.raises(BadInput, match="another `brt prepare`"), Ledger(run.folder, settings[0]).held():
            pass
        return make_manifest(*parts)

    monkeypatch.setattr("preprocessing.prepare.make_manifest", late)
    run()
    assert len(settings) == 1
    with Ledger(run.folder, settings[0]).held():
        pass


def test_a_disk_that_is_full_before_anything_is_finished_is_named_and_binds_the_folder_to_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of repeated texts is written, and the first line of the ledger doesn't fit behind it."""
    (run.corpus.root / "98.txt").write_text("once more\n")
    (run.corpus.root / "99.txt").write_text("once more\n")

    def full(*_: object) -> None:
        raise BadInput("units.jsonl cannot be written: No space left on device")

    with pytest.MonkeyPatch.context() as full_disk:
        full_disk.setattr(Ledger, "_add", full)
        with pytest.raises(BadInput, match="No space left"):
            run()
    # The next run is of a corpus in which no text stands twice.
    (run.corpus.root / "99.txt").unlink()
    run()
    left = run.files()
    run.folder = tmp_path / "fresh"
    run.shards = ShardsConfig(dir=str(run.folder), unit_bytes=5000)
    run()
    assert run.files() == left
