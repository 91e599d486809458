"""Shards go to Megatron's datasets and come back without a changed token; megatron-core's own classes are the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from shard_folders import EOS, VOCAB, finished_folder, row

from brt_dist.cli import main
from brt_dist.data import interchange
from brt_dist.data.check import check_shards
from brt_dist.data.errors import BadInput
from brt_dist.data.interchange import Vocabulary, export_shards, import_datasets
from brt_dist.data.lanes import plan_lanes
from brt_dist.data.loader import read_batch
from brt_dist.data.token_shards import Documents, TokenShards
from brt_dist.data.tokenizer import Tokenizer, train_tokenizer

VOCABULARY = Vocabulary(VOCAB, EOS)
# Of the documents that `build` writes: lengths of their sequences.
SEQUENCES = [[3], [2, 4, 1], [5, 0, 5], [1], [300, 200]]


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Two shards, an empty document and all splits among them, ids up to the largest."""
    random = np.random.default_rng(0)
    lengths = [5, 0, 700, 1, 30, 2, 9]
    rows = [
        row(
            f"document {number}",
            random.integers(2, VOCAB, length),
            ("train", "test", "train", "validation")[number % 4],
        )
        for number, length in enumerate(lengths)
    ]
    rows[0].tokens[:2] = 2, VOCAB - 1
    return finished_folder(tmp_path / "ours", {"a.arrow": rows[:3], "b.arrow": rows[3:]})


def all_tokens(documents: Documents) -> list[list[int]]:
    return [documents.tokens(index).tolist() for index in range(len(documents))]


def build(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    """A dataset made by megatron-core: for each document the tokens of each of its sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for tokens in sequences:
            builder.add_item(torch.tensor(tokens, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def numbered(lengths: list[list[int]], end: list[int]) -> list[list[list[int]]]:
    """Tokens that count up from 2, with `end` behind each document."""
    token, documents = 2, []
    for sequences in lengths:
        documents.append([list(range(token := token + 1, token := token + length)) for length in sequences])
        documents[-1][-1].extend(end)
    return documents


# --- export ---


@pytest.mark.parametrize("split", ["train", "validation", "test", "all"])
@pytest.mark.parametrize("with_eos", [True, False])
def test_megatron_core_reads_what_is_exported(ours: Path, tmp_path: Path, split: str, with_eos: bool) -> None:
    documents = TokenShards.open(ours).split(split)
    moved = export_shards(ours, tmp_path / "theirs", split, end_with_eos=with_eos)
    dataset = IndexedDataset(str(tmp_path / "theirs"))
    end = [EOS] if with_eos else []
    assert [dataset[index].tolist() for index in range(len(dataset))] == [
        tokens + end for tokens in all_tokens(documents)
    ]
    assert dataset.sequence_lengths.tolist() == (documents.lengths + len(end)).tolist()
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    assert (moved.documents, moved.tokens) == (len(documents), int(dataset.sequence_lengths.sum()))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32), (70_000, np.int32)])
def test_tokens_have_the_type_that_megatron_takes(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    rows = [row("one", [2, vocab_size - 1])]
    folder = finished_folder(tmp_path / "ours", {"a.arrow": rows}, vocab_size=vocab_size)
    export_shards(folder, tmp_path / "theirs", "train")
    dataset = IndexedDataset(str(tmp_path / "theirs"))
    assert dataset[0].tolist() == [2, vocab_size - 1, EOS]
    assert dataset.index.dtype == dtype


def test_an_id_that_megatron_has_no_room_for_is_not_exported(tmp_path: Path) -> None:
    for largest in (2**31 - 1, 2**31):
        rows = [row("one", np.array([2, largest], np.uint32))]
        folder = finished_folder(tmp_path / f"ours {largest}", {"a.arrow": rows}, vocab_size=2**32)
        if largest < 2**31:
            export_shards(folder, tmp_path / "fits", "train")
            dataset = IndexedDataset(str(tmp_path / "fits"))
            assert dataset[0].tolist() == [2, largest, EOS]
        else:
            with pytest.raises(BadInput, match="document 0 has the id 2147483648, Megatron's are at most 2147483647"):
                export_shards(folder, tmp_path / "theirs", "train")
    assert not list(tmp_path.glob("theirs*"))


@pytest.mark.parametrize("kind", ["bin", "idx"])
def test_an_export_overwrites_nothing(ours: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / f"theirs.{kind}").write_bytes(b"earlier")
    with pytest.raises(BadInput, match=rf"theirs\.{kind} is there already"):
        export_shards(ours, tmp_path / "theirs", "all")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [f"theirs.{kind}"]
    assert (tmp_path / f"theirs.{kind}").read_bytes() == b"earlier"


def test_a_failed_export_leaves_nothing_behind(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Documents, index: int) -> np.ndarray:
        if index == 4:
            raise OSError(28, "No space left on device")
        return np.zeros(3, np.uint16)

    monkeypatch.setattr(Documents, "tokens", failing)
    with pytest.raises(BadInput, match="theirs cannot be written: No space left on device"):
        export_shards(ours, tmp_path / "theirs", "all")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_split_without_documents_is_not_exported(tmp_path: Path) -> None:
    folder = finished_folder(tmp_path / "ours", {"a.arrow": [row("one", [4])]})
    with pytest.raises(BadInput, match=r"split test of the shards in .* has no documents"):
        export_shards(folder, tmp_path / "theirs", "test")


# --- import ---


@pytest.mark.parametrize("with_eos", [True, False])
def test_a_round_trip_changes_no_token(ours: Path, tmp_path: Path, with_eos: bool) -> None:
    before = TokenShards.open(ours).split("all")
    export_shards(ours, tmp_path / "theirs", "all", end_with_eos=with_eos)
    moved = import_datasets([tmp_path / "theirs"], tmp_path / "back", VOCABULARY)
    after = TokenShards.open(tmp_path / "back").split("all")
    assert all_tokens(after) == [tokens for tokens in all_tokens(before) if tokens]
    assert after.tokens(0).dtype == before.tokens(0).dtype
    assert (moved.documents, moved.tokens, moved.empty) == (6, 747, 1)
    assert after.ids == [f"theirs:{number}" for number in (0, 2, 3, 4, 5, 6)]
    assert check_shards(tmp_path / "back").documents == 6


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("end", [[], [EOS]])
def test_the_sequences_of_a_document_are_joined(tmp_path: Path, dtype: type, end: list[int]) -> None:
    documents = numbered(SEQUENCES, end)
    prefix = build(tmp_path / "theirs", documents, dtype)
    import_datasets([prefix], tmp_path / "back", VOCABULARY)
    joined = [[token for sequence in sequences for token in sequence] for sequences in documents]
    read = all_tokens(TokenShards.open(tmp_path / "back").split("all"))
    assert read == [tokens[: len(tokens) - len(end)] for tokens in joined]


def test_what_was_imported_is_sound_and_says_where_it_is_from(tmp_path: Path) -> None:
    prefix = build(tmp_path / "theirs", numbered(SEQUENCES, [EOS]))
    import_datasets([prefix], tmp_path / "back", VOCABULARY, validation=0.3, test=0.3)
    assert check_shards(tmp_path / "back").documents == 5
    shards = TokenShards.open(tmp_path / "back")
    assert (shards.vocab_size, shards.eos) == (VOCAB, EOS)
    documents = shards.split("all")
    assert documents.sources[3] == f"{prefix}.bin, document 3"
    assert (documents.corpora, documents.bytes.sum(), documents.words.sum()) == (("",), 0, 0)
    assert set(documents.splits) == {"train", "validation", "test"}
    settings = shards.manifest["settings"]
    assert settings["imported"] == [{"prefix": str(prefix), "sequences": 10}]
    with pytest.raises(BadInput, match="imported without a tokenizer"):
        _ = shards.tokenizer_path
    (tmp_path / "back" / "shard-00000.arrow").unlink()
    with pytest.raises(BadInput, match=r"is missing.*`brt data import` again"):
        TokenShards.open(tmp_path / "back")


def test_each_of_several_datasets_is_a_corpus(tmp_path: Path) -> None:
    for name in ("books", "code"):
        build(tmp_path / name, numbered([[3], [4]], [EOS]))
    import_datasets([tmp_path / "books.bin", tmp_path / "code.idx"], tmp_path / "back", VOCABULARY)
    documents = TokenShards.open(tmp_path / "back").split("all")
    assert (documents.corpora, documents.corpus_of.tolist()) == (("books", "code"), [0, 0, 1, 1])
    assert documents.ids == ["books:0", "books:1", "code:0", "code:1"]
    (tmp_path / "other").mkdir()
    build(tmp_path / "other" / "code", numbered([[3]], []))
    with pytest.raises(BadInput, match="two datasets are named code"):
        import_datasets([tmp_path / "code", tmp_path / "other" / "code"], tmp_path / "twice", VOCABULARY)
    assert not (tmp_path / "twice").exists()


def test_with_a_tokenizer_bytes_and_words_are_those_of_the_text(tmp_path: Path) -> None:
    texts = ["one two  three\n", "four \U0001f600", "five"]
    (tmp_path / "m.model").write_bytes(train_tokenizer(texts, "bpe", 280))
    tokenizer = Tokenizer.open(tmp_path / "m.model")
    encoded = [[[*tokenizer.encode(text).tolist(), tokenizer.eos]] for text in texts]
    prefix = build(tmp_path / "theirs", encoded)
    assert main(["data", "import", str(prefix), str(tmp_path / "back"), "--tokenizer", str(tmp_path / "m.model")]) == 0
    documents = TokenShards.open(tmp_path / "back").split("all")
    assert documents.bytes.tolist() == [len(text.encode()) for text in texts]
    assert documents.words.tolist() == [len(text.split()) for text in texts]
    shards = TokenShards.open(tmp_path / "back")
    assert shards.tokenizer_path.read_bytes() == (tmp_path / "m.model").read_bytes()
    assert (shards.vocab_size, shards.eos, shards.manifest["tokenizer"]["lossless"]) == (280, tokenizer.eos, True)
    assert check_shards(tmp_path / "back").documents == 3


def test_the_end_of_a_document_inside_one_is_an_error_or_divides_it(tmp_path: Path) -> None:
    packed = [[[5, 6]], [[7, EOS, 8, 9], [EOS, EOS, 10, EOS]], [[EOS]], [[11, EOS, 12]]]
    prefix = build(tmp_path / "theirs", packed)
    with pytest.raises(BadInput, match=r"document 1 has EOS \(1\) inside, at token 1 of 8 \(--split-at-eos"):
        import_datasets([prefix], tmp_path / "back", VOCABULARY)
    assert not (tmp_path / "back" / "manifest.json").exists()
    moved = import_datasets([prefix], tmp_path / "back", VOCABULARY, split_at_eos=True)
    documents = TokenShards.open(tmp_path / "back").split("all")
    assert dict(zip(documents.ids, all_tokens(documents), strict=True)) == {
        "theirs:0": [5, 6],
        "theirs:1/0": [7],
        "theirs:1/1": [8, 9],
        "theirs:1/3": [10],
        "theirs:3/0": [11],
        "theirs:3/1": [12],
    }
    # The stretch between two ends, and the document that is nothing but an end.
    assert moved.empty == 2
    assert TokenShards.open(tmp_path / "back").manifest["skipped"] == {"empty": 2}


@pytest.mark.parametrize(("token", "dtype"), [(VOCAB, np.uint16), (70_000, np.int32), (-1, np.int32)])
def test_an_id_outside_the_vocabulary_is_named(tmp_path: Path, token: int, dtype: type) -> None:
    prefix = build(tmp_path / "theirs", [[[5, 6]], [[7], [8, token, 9]]], dtype)
    with pytest.raises(BadInput, match=rf"theirs\.bin: document 1 has at token 2 the id {token}, outside a vocabulary"):
        import_datasets([prefix], tmp_path / "back", VOCABULARY)


def test_shards_are_closed_when_they_are_full_and_no_document_is_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interchange, "_SHARD_TOKENS", 10)
    documents = numbered([[4], [4], [4], [30], [1], [10], [2]], [])
    import_datasets([build(tmp_path / "theirs", documents)], tmp_path / "back", VOCABULARY)
    shards = TokenShards.open(tmp_path / "back")
    assert [entry["documents"] for entry in shards.manifest["shards"]] == [3, 1, 2, 1]
    assert all_tokens(shards.split("all")) == [sequences[0] for sequences in documents]


def test_an_import_that_was_killed_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = build(tmp_path / "theirs", numbered([[4]] * 6, [EOS]))
    import_datasets([prefix], tmp_path / "whole", VOCABULARY)
    monkeypatch.setattr(interchange, "_SHARD_TOKENS", 10)

    def killed(folder: Path, manifest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(interchange, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        import_datasets([prefix], tmp_path / "back", VOCABULARY)
    left = sorted(path.name for path in (tmp_path / "back").iterdir())
    assert left == ["shard-00000.arrow", "shard-00001.arrow"]
    for half in (".shard-00002.arrow.17.part", ".tokenizer.model.17.part", ".manifest.json.17.part"):
        (tmp_path / "back" / half).write_bytes(b"half")
    monkeypatch.undo()
    import_datasets([prefix], tmp_path / "back", VOCABULARY)
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


@pytest.mark.parametrize("name", ["manifest.json", "units.jsonl", "notes.txt"])
def test_a_folder_that_holds_anything_else_is_left_alone(tmp_path: Path, name: str) -> None:
    prefix = build(tmp_path / "theirs", numbered([[4]], []))
    (tmp_path / "back").mkdir()
    for kept in ("shard-00000.arrow", name):
        (tmp_path / "back" / kept).write_bytes(b"kept")
    with pytest.raises(BadInput, match=rf"back holds {name} already"):
        import_datasets([prefix], tmp_path / "back", VOCABULARY)
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == {
        "shard-00000.arrow": b"kept",
        name: b"kept",
    }


Damage = Callable[[Path, Path], object]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, index: index.unlink(), r"theirs\.idx does not exist"),
        (lambda data, index: data.unlink(), r"theirs\.bin does not exist"),
        (lambda data, index: data.write_bytes(data.read_bytes()[:-2]), "expected 1052 bytes, found 1050"),
        (lambda data, index: data.write_bytes(data.read_bytes() + b"xx"), "expected 1052 bytes, found 1054"),
        (lambda data, index: data.write_bytes(b""), "is empty"),
        (
            lambda data, index: index.write_bytes(index.read_bytes()[:-8]),
            "damaged: 10 sequences need 202 bytes, found 194",
        ),
        (lambda data, index: index.write_bytes(index.read_bytes()[:20]), "is not the index of a Megatron"),
        (lambda data, index: index.write_bytes(b"X" + index.read_bytes()[1:]), "is not the index of a Megatron"),
        (lambda data, index: index.write_bytes(b""), "is not the index of a Megatron"),
        (lambda data, index: change(index, 17, 7), "tokens are of type 7, which is no whole number"),
        (lambda data, index: change(index, 17, 99), "tokens are of type 99"),
        (lambda data, index: change(index, -8, 0), "its documents do not end with its last sequence"),
        (lambda data, index: change(index, -16, 99), "its documents do not follow each other"),
    ],
)
def test_a_damaged_dataset_is_one_line(
    tmp_path: Path, damage: Damage, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    prefix = build(tmp_path / "theirs", numbered(SEQUENCES, [EOS]))
    damage(tmp_path / "theirs.bin", tmp_path / "theirs.idx")
    with pytest.raises(BadInput, match=message):
        import_datasets([prefix], tmp_path / "back", VOCABULARY)
    assert not (tmp_path / "back").exists()
    assert capfd.readouterr() == ("", "")


def change(path: Path, place: int, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] = byte
    path.write_bytes(content)


# --- what the command line asks ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs --tokenizer, or --vocab-size and --eos"),
        (["--vocab-size", "100"], "needs --tokenizer, or --vocab-size and --eos"),
        (["--vocab-size", f"{2**32 + 1}", "--eos", "0"], "--vocab-size 4294967297 is more than the 4294967296 ids"),
        (["--vocab-size", "100", "--eos", "100"], "--eos 100 is outside a vocabulary of 100"),
        (["--tokenizer", "m.model", "--eos", "3"], "the tokenizer m.model says what --vocab-size and --eos are"),
        (["--vocab-size", "100", "--eos", "3", "--test", "1"], "--validation 0.1 and --test 1.0 must not be negative"),
        (["--vocab-size", "100", "--eos", "3", "--test=-1"], "must not be negative"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "import", str(tmp_path / "theirs"), str(tmp_path / "back"), *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_the_commands_tell_what_was_moved(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, back = str(tmp_path / "theirs"), str(tmp_path / "back")
    assert main(["data", "export", str(ours), theirs, "--split", "all", "--no-eos"]) == 0
    assert capsys.readouterr().out.startswith(f"{theirs}: 7 documents, 747 tokens, ")
    assert main(["data", "import", theirs, back, "--vocab-size", str(VOCAB), "--eos", "1", "--test", "0.5"]) == 0
    assert capsys.readouterr().out.startswith(f"{back}: 6 documents, 747 tokens (1 empty documents left out), ")
    manifest = json.loads((tmp_path / "back" / "manifest.json").read_text())
    assert manifest["settings"]["splits"] == {"validation": 0.1, "test": 0.5}


def test_lanes_read_what_was_imported(tmp_path: Path) -> None:
    documents = numbered([[40], [7, 8], [100]], [EOS])
    import_datasets([build(tmp_path / "theirs", documents, np.int32)], tmp_path / "back", VOCABULARY, 0, 0)
    shards = TokenShards.open(tmp_path / "back")
    train = shards.split("train")
    plan = plan_lanes(train.lengths, lanes=3, segment=16, window=8, epochs=1)
    seen: dict[int, list[int]] = {}
    for position in range(plan.positions):
        batch = read_batch(train, plan, shards.eos, position, range(3))
        for targets_L, pieces in zip(batch.targets_BL, batch.pieces, strict=True):
            for piece in pieces:
                tokens = targets_L[piece.column : piece.column + piece.count].tolist()
                seen.setdefault(piece.document, []).extend(tokens)
    assert [seen[index] for index in range(3)] == [
        [token for sequence in sequences for token in sequence] for sequences in documents
    ]
