"""A document comes back from its id, to the byte; an id that is not there is answered with its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_folders import finished_folder, row

from brt_dist.cli import main
from brt_dist.data import documents
from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import ShardRow, TokenShards
from brt_dist.data.tokenizer import SPACE_MARK, Tokenizer, train_tokenizer

TEXTS = {
    "books/one.txt": f"  One {SPACE_MARK} and\r\n\ta \x00 half \U0001f600\n\n",
    "books/two.txt": "Two.",
    "code/three.py": "print(3)\n" * 40,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real texts, in shards of two corpora."""
    model = train_tokenizer([text * 3 for text in TEXTS.values()], "bpe", 300)
    tokenizer = Tokenizer(model)
    rows = {
        name: ShardRow(name, f"from {name}", split, len(text.encode()), len(text.split()), tokenizer.encode(text))
        for (name, text), split in zip(TEXTS.items(), ("train", "test", "train"), strict=True)
    }
    shards = {"a.arrow": [rows["books/one.txt"], rows["books/two.txt"]], "b.arrow": [rows["code/three.py"]]}
    corpora = {"a.arrow": "books", "b.arrow": "code"}
    return finished_folder(tmp_path_factory.mktemp("shown"), shards, corpora, model, vocab_size=tokenizer.vocab_size)


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_comes_back_to_the_byte(folder: Path, name: str, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main(["data", "show", str(folder), "--document", name]) == 0
    shown = capfdbinary.readouterr()
    assert shown.out == TEXTS[name].encode()
    facts = shown.err.decode()
    assert facts.count("\n") == 1
    assert facts.startswith(f"{name}: corpus {name.partition('/')[0]}, split ")
    assert f"source from {name}, " in facts
    assert facts.endswith(f" tokens, {len(TEXTS[name].encode()):,} bytes\n")


def test_the_tokens_of_a_document_are_printed_one_a_line(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(folder), "--document", "books/two.txt", "--tokens"]) == 0
    tokens = [int(line) for line in capfd.readouterr().out.splitlines()]
    assert tokens == TokenShards.open(folder).split("test").tokens(0).tolist()


def test_without_an_id_all_corpora_and_splits_are_counted(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(folder)]) == 0
    heads, *lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert heads == ["corpus", "split", "documents", "tokens", "bytes"]
    size = str(len(TEXTS["code/three.py"].encode()))
    tokens = str(len(TokenShards.open(folder).split("all").tokens(2)))
    assert ["code", "train", "1", tokens, size] in lines
    assert [line[:3] for line in lines if line[1] != "validation"] == [
        ["books", "train", "1"],
        ["code", "train", "1"],
        ["books", "test", "1"],
        ["code", "test", "0"],
    ]


def test_an_id_that_is_not_there_is_answered_with_the_nearest(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(folder), "--document", "two"]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err == "brt: there is no document 'two' among 3; the nearest ids: books/two.txt\n"


def test_an_id_of_bytes_that_are_no_text_is_not_there(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(folder), "--document", b"\xff.txt".decode(errors="surrogateescape")]) == 2
    assert capfd.readouterr().err.startswith("brt: there is no document '\\udcff.txt': that is not Unicode text")


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        ("library/0450.txt", "library/0450.text"),
        ("library/9999.text", "library/0999.text"),
        ("000", "library/0000.text, library/0001.text, library/0002.text"),
        ("LIBRARY/0007", "library/0007.text"),
        ("another", "library/"),
        ("", "library/"),
    ],
)
def test_the_nearest_ids_are_found_among_many(tmp_path: Path, wanted: str, nearest: str) -> None:
    rows = [row(f"library/{number:04}.text", [4]) for number in range(1000)]
    shards = TokenShards.open(finished_folder(tmp_path, {"a.arrow": rows[:2], "b.arrow": rows[2:]}))
    with pytest.raises(BadInput, match="among 1000; the nearest ids: ") as caught:
        shards.split("all").only(wanted)
    assert nearest in str(caught.value).split("nearest ids: ")[1]
    assert str(caught.value).count("library") <= 1 + 3


def test_of_many_ids_only_those_that_begin_alike_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_COMPARED_IDS", 20)
    rows = [row(f"library/{number:04}.text", [4]) for number in range(1000)]
    shards = TokenShards.open(finished_folder(tmp_path, {"a.arrow": rows[:450], "b.arrow": rows[450:]}))
    with pytest.raises(BadInput, match=r"the nearest ids: library/0450\.text$"):
        shards.split("all").only("library/0450.txt")


def test_only_documents_of_the_split_are_found(folder: Path) -> None:
    shards = TokenShards.open(folder)
    assert shards.split("test").only("books/two.txt").ids == ["books/two.txt"]
    with pytest.raises(BadInput, match=r"no document 'books/one\.txt' among 1"):
        shards.split("test").only("books/one.txt")


def test_among_no_documents_there_is_no_nearest_id(tmp_path: Path) -> None:
    shards = TokenShards.open(finished_folder(tmp_path, {"a.arrow": []}))
    with pytest.raises(BadInput, match="no document 'x' among 0; the nearest ids: there are none at all"):
        shards.split("all").only("x")
