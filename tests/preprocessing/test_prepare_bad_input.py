"""What is odd in a corpus comes back to the byte or is counted; what cannot go on costs nothing that is finished."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prepare_runs import SENTENCE, Run

from brt_dist.cli import main
from brt_dist.data.errors import BadInput
from brt_dist.data.tokenizer import SPACE_MARK, Tokenizer
from preprocessing.config import CorpusConfig, DocumentsConfig, ShardsConfig, TokenizerConfig

ODD = {
    "NUL": "a\x00b\x00\x00",
    "mark": f"{SPACE_MARK} literal {SPACE_MARK}{SPACE_MARK}",
    "CRLF": "one\r\ntwo\r\n\r\nthree\r",
    "one token": "a",
    "white": " \t\n  \n",
    "long line": "x" * 300_000 + " " + "y" * 300_000,
    "controls": "\x01\x1f\x7f\x85\u2028\ufeff",
}
# Starts `brt` where no file may grow beyond so many bytes, as on a disk that is full at some point.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from brt_dist.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_odd_texts_come_back_to_the_byte_and_empty_ones_are_counted(run: Run, kind: str):
    for name, text in ODD.items():
        (run.corpus.root / f"{name}.txt").write_bytes(text.encode())
    (run.corpus.root / "empty.txt").write_bytes(b"")
    run.tokenizer = TokenizerConfig(kind=kind) if kind == "bytes" else run.tokenizer
    run.check_round_trip = True
    shards = run()
    documents, tokenizer = shards.split("all"), Tokenizer.open(shards.tokenizer_path)
    texts = {name: tokenizer.decode(documents.tokens(index)) for index, name in enumerate(documents.ids)}
    assert {name: texts[f"{name}.txt"] for name in ODD} == ODD
    assert shards.manifest["skipped"]["empty"] == 1
    assert "1 empty" in run.printed
    words = dict(zip(documents.ids, documents.words.tolist(), strict=True))
    assert {name: words[f"{name}.txt"] for name in ODD} == {name: len(text.split()) for name, text in ODD.items()}
    told = shards.manifest["tokenizer"]
    assert (told["lossless"], told["checked_documents"]) == (True, len(documents))
    assert shards.vocab_size == (260 if kind == "bytes" else 330)


def test_a_vocabulary_too_large_for_the_corpus_is_named_and_leaves_nothing_behind(run: Run):
    run.tokenizer = TokenizerConfig(vocab_size=16000)
    with pytest.raises(
        BadInput, match=r"tokenizer\.vocab_size 16000 is too large for this text, .* at most \d+ pieces"
    ):
        run()
    assert not run.folder.exists()


def test_damaged_lines_are_named_or_by_a_key_counted_and_the_others_kept(run: Run):
    lines = [json.dumps({"id": number, "text": SENTENCE + str(number)}) for number in range(20)]
    lines[7] = lines[7][:40]
    (run.corpus.root / "a.jsonl").write_text("\n".join(lines))
    run.corpus = CorpusConfig(reader="jsonl", path=str(run.corpus.root))
    run.tokenizer = TokenizerConfig(kind="bytes")
    with pytest.raises(BadInput, match=r"a\.jsonl line 8: not valid JSON"):
        run()
    assert not run.folder.exists()
    run.documents = DocumentsConfig(damaged="skip")
    manifest = run().manifest
    assert (manifest["documents"], manifest["skipped"]["damaged"]) == (19, 1)
    assert "a.jsonl" in manifest["skipped_documents"][0]["source"]


def test_a_full_disk_is_one_line_and_what_was_finished_stays(run: Run, tmp_path: Path):
    (run.corpus.root / "99.txt").write_text(SENTENCE * 3000)
    run.tokenizer = TokenizerConfig(kind="bytes")
    run()
    whole = run.files()
    settings = {
        "corpus": {"path": run.corpus.path},
        "tokenizer": {"kind": "bytes"},
        "splits": {"validation": 0.2, "test": 0.2},
        "shards": {"dir": str(tmp_path / "full"), "unit_bytes": 5000},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = ["prepare", str(tmp_path / "run.yaml")]
    limit = str(sorted(map(len, whole.values()))[-2] + 1000)
    done = subprocess.run([sys.executable, "-c", LIMITED, limit, *command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    finished = {path.name: path.read_bytes() for path in (tmp_path / "full").iterdir()}
    last = f"shard-{len(finished) - 2:06d}.arrow"
    assert f"{last} cannot be written: " in line
    assert {name: whole[name] for name in finished if name != "units.jsonl"} == {
        name: content for name, content in finished.items() if name != "units.jsonl"
    }
    assert len(finished) > 4
    assert main(command) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "full").iterdir()} == whole


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="needs a file system in which nobody can make a folder")
def test_a_place_where_nothing_can_be_written_is_named(run: Run):
    run.shards = ShardsConfig(dir="/sys/kernel/shards")
    with pytest.raises(BadInput, match=r"/sys/kernel/shards/units\.jsonl cannot be written: "):
        run()


def test_a_folder_whose_files_cannot_be_replaced_is_named_and_stays_as_it_is(run: Run, tmp_path: Path):
    """Where a shard should be there is a folder."""
    run()
    (run.folder / "manifest.json").unlink()
    (run.folder / "shard-000002.arrow").unlink()
    (run.folder / "shard-000002.arrow").mkdir()
    with pytest.raises(BadInput, match=r"shard-000002\.arrow cannot be written: Is a directory"):
        run()
    (run.folder / "shard-000002.arrow").rmdir()
    run()
    assert "shards are finished and kept" in run.printed
