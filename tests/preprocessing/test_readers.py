"""Each reader finds every document once, whatever the units of work, and names what is wrong and where."""

from __future__ import annotations

import json
import pickle
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import EVERYTHING, contents, listed, read_all, read_one

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig
from preprocessing.documents import decode
from preprocessing.walk import matches


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "b.py": b"beta\n",
        "a/z.py": b"last",
        "a/b/c.py": b"first\n",
        "a-b/x.py": b"x",
        "a/notes.txt": b"notes",
        "test/t.py": b"test",
        "a/test/u.py": b"deep test",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_each_file_that_matches_is_a_document_in_path_order(tree: Path) -> None:
    corpus = CorpusConfig(path=str(tree / "**/*.py"), exclude=("test",))
    assert list(contents(corpus).items()) == [
        ("a/b/c.py", b"first\n"),
        ("a/z.py", b"last"),
        ("a-b/x.py", b"x"),
        ("b.py", b"beta\n"),
    ]


@pytest.mark.parametrize("unit_bytes", [1, 7, EVERYTHING])
def test_a_top_level_folder_is_one_document_whatever_the_units(tree: Path, unit_bytes: int) -> None:
    corpus = CorpusConfig(path=str(tree / "**/*.py"), exclude=("te*",), group="top")
    assert list(contents(corpus, unit_bytes).items()) == [("a", b"first\nlast"), ("a-b", b"x"), ("b.py", b"beta\n")]


def test_a_single_file_is_a_corpus(tree: Path) -> None:
    assert contents(CorpusConfig(path=str(tree / "a" / "z.py"))) == {"z.py": b"last"}


def test_the_default_pattern_of_files_is_every_file_and_a_folder_may_be_left_out(tree: Path) -> None:
    assert len(read_all(CorpusConfig(path=str(tree)))) == 7
    corpus = CorpusConfig(path=str(tree))
    names = {part.file for unit in listed(corpus, 1, leave_out=(tree / "a").resolve()) for part in unit.parts}
    assert names == {"b.py", "a-b/x.py", "test/t.py"}


def test_a_linked_folder_is_read_like_any_other(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "far.py").write_bytes(b"far")
    (tree / "a" / "link").symlink_to(other)
    (tree / "test" / "near").symlink_to(tree / "a-b")
    found = contents(CorpusConfig(path=str(tree)))
    assert len(found) == 9
    assert (found["a/link/far.py"], found["test/near/x.py"]) == (b"far", b"x")


def test_links_that_run_in_circles_or_lead_nowhere_are_left_out_by_name(tree: Path) -> None:
    (tree / "a" / "up").symlink_to("..")
    (tree / "a" / "self").symlink_to("self")
    (tree / "gone").symlink_to("nowhere")
    (tree / "test" / "there").symlink_to(tree / "a-b")
    (tree / "a-b" / "back").symlink_to(tree / "test")
    said: list[str] = []
    units = listed(CorpusConfig(path=str(tree)), EVERYTHING, say=said.append)
    names = {part.file for unit in units for part in unit.parts}
    assert len(names) == 7 + 2
    assert {"a-b/back/t.py", "test/there/x.py"} < names
    assert [line.rsplit(": ")[1] for line in said] == ["a-b/back/there", "a/self", "a/up", "gone", "test/there/back"]


def test_stdlib_in_a_path_stands_for_the_standard_library() -> None:
    corpus = CorpusConfig(path="{stdlib}/json/*.py")
    assert contents(corpus)["decoder.py"] == Path(sysconfig.get_paths()["stdlib"], "json/decoder.py").read_bytes()


@pytest.mark.parametrize(
    ("path", "pattern", "matched"),
    [
        ("a.py", "**/*.py", True),
        ("x/y/a.py", "**/*.py", True),
        ("x/y/a.py", "*.py", False),
        ("x/y/a.py", "x/**", True),
        ("x/y/a.py", "x/*/a.*", True),
        ("x/y/z/a.py", "x/*/a.*", False),
        ("x/a.PY", "**/*.py", False),
    ],
)
def test_a_pattern_is_matched_folder_by_folder(path: str, pattern: str, matched: bool) -> None:
    assert matches(tuple(path.split("/")), tuple(pattern.split("/"))) is matched


def test_a_unit_can_be_sent_to_another_process(tree: Path) -> None:
    corpus = CorpusConfig(path=str(tree))
    for unit in listed(corpus, 6):
        again = pickle.loads(pickle.dumps(unit))
        assert list(read_one(corpus, again)) == list(read_one(corpus, unit))


def test_the_fingerprint_sees_a_changed_size_and_a_changed_name_but_no_time(tree: Path) -> None:
    corpus = CorpusConfig(path=str(tree))
    marks = [listed(corpus, 10).fingerprint()]
    (tree / "b.py").touch()
    assert listed(corpus, 10).fingerprint() == marks[0]
    (tree / "b.py").write_bytes(b"longer than before\n")
    marks.append(listed(corpus, 10).fingerprint())
    (tree / "b.py").rename(tree / "c.py")
    marks.append(listed(corpus, 10).fingerprint())
    assert len({mark["hash"] for mark in marks}) == 3


def test_a_corpus_that_is_not_there_and_one_without_files_are_named(tree: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere does not exist"):
        listed(CorpusConfig(path=str(tree / "nowhere")), 1)
    with pytest.raises(BadInput, match=r"corpus is empty: no file below .* matches '\*\*/\*\.xyz'"):
        listed(CorpusConfig(path=str(tree / "**/*.xyz")), 1)
    with pytest.raises(BadInput, match=r"corpus\.path is empty"):
        listed(CorpusConfig(), 1)


@pytest.mark.parametrize("unit_bytes", [1, 40, 41, 42, 43, 100, EVERYTHING])
def test_every_json_line_is_read_once_whatever_the_byte_ranges(tmp_path: Path, unit_bytes: int) -> None:
    lines = [json.dumps({"id": f"n{number}", "text": "é\n" * number, "more": 1}) for number in range(1, 20)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines[:9]) + "\r\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\n".join(lines[9:]), encoding="utf-8")
    corpus = CorpusConfig(reader="jsonl", path=str(tmp_path))
    documents = read_all(corpus, unit_bytes)
    assert [document.id for document in documents] == [f"n{number}" for number in range(1, 20)]
    assert [document.content.decode() for document in documents] == ["é\n" * number for number in range(1, 20)]


def test_a_json_line_without_an_id_is_named_by_file_and_byte_and_numbers_are_ids(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n{"body": "y", "id": 7}\n{"body": null}\n')
    corpus = CorpusConfig(reader="jsonl", path=str(tmp_path / "a.jsonl"), text_key="body")
    assert contents(corpus) == {"a.jsonl@0": b"x", "7": b"y", "a.jsonl@37": b""}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"a\.jsonl line 3: not valid JSON"),
        (b'{"title": 1, "body": "x"}', r"a\.jsonl line 3: no key 'text'; found 'title', 'body'"),
        (b'{"text": 3}', r"a\.jsonl line 3: 'text' must be a string, found int"),
        (b'{"text": "x", "id": [1]}', r"a\.jsonl line 3: 'id' must be a string or a whole number, found list"),
        (b'{"text": "x", "id": true}', r"a\.jsonl line 3: 'id' must be a string or a whole number, found bool"),
        (b'"text"', r"a\.jsonl line 3: expected an object with the key 'text', found str"),
        (b"\xff\xfe", r"a\.jsonl line 3: not valid JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl line 3: not valid JSON"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "four"}\n')
    for unit_bytes in (5, EVERYTHING):
        with pytest.raises(BadInput, match=message):
            read_all(CorpusConfig(reader="jsonl", path=str(tmp_path)), unit_bytes)


@pytest.mark.parametrize(
    "text", [b"a\xffb", b"a\\ud800b", b"a\\udcffb", b"\\udcc3\\udca9", b"\xff\\udcc3\\udca9", b"\\ude00\\ud83d"]
)
def test_json_text_that_is_no_unicode_counts_as_invalid_utf8(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + text + b'"}\n')
    (document,) = read_all(CorpusConfig(reader="jsonl", path=str(tmp_path)))
    assert decode(document, "skip").why == "invalid_utf8"


def test_a_surrogate_pair_escaped_in_json_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud83d\\ude00"}\n')
    assert list(contents(CorpusConfig(reader="jsonl", path=str(tmp_path))).values()) == ["😀".encode()]


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_shorter_corpus(tmp_path: Path) -> None:
    for reader, name, content in (("jsonl", "a.jsonl", b'{"text": "x"}\n' * 5), ("files", "b.txt", b"hello")):
        (tmp_path / name).write_bytes(content)
        corpus = CorpusConfig(reader=reader, path=str(tmp_path / name))
        (unit,) = listed(corpus, EVERYTHING)
        (tmp_path / name).write_bytes(content[: len(content) // 5])
        with pytest.raises(BadInput, match="changed while it was read"):
            list(read_one(corpus, unit))


def parquet_file(path: Path, columns: dict[str, pa.Array]) -> CorpusConfig:
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return CorpusConfig(reader="parquet", path=str(path))


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("unit_bytes", [1, EVERYTHING])
def test_every_parquet_row_is_read_once_whatever_the_row_groups(tmp_path: Path, kind, unit_bytes: int) -> None:
    texts = [f"é text {number % 4}" for number in range(8)]
    text = pa.array(texts).cast(pa.binary()) if kind == pa.binary() else pa.array(texts).cast(kind)
    corpus = parquet_file(tmp_path / "a.parquet", {"text": text, "id": pa.array(range(8)), "other": pa.array(texts)})
    assert len(listed(corpus, 1)) == 3
    assert contents(corpus, unit_bytes) == {str(number): text.encode() for number, text in enumerate(texts)}


def test_a_parquet_row_without_an_id_is_named_by_file_and_row_and_null_is_empty(tmp_path: Path) -> None:
    corpus = parquet_file(tmp_path / "a.parquet", {"text": pa.array(["p", None, "q", "r"])})
    expected = {"a.parquet:0": b"p", "a.parquet:1": b"", "a.parquet:2": b"q", "a.parquet:3": b"r"}
    assert contents(corpus, 1) == expected


def test_parquet_ids_that_are_all_null_are_file_and_row(tmp_path: Path) -> None:
    corpus = parquet_file(tmp_path / "a.parquet", {"text": pa.array(["p", "q"]), "id": pa.nulls(2)})
    assert contents(corpus) == {"a.parquet:0": b"p", "a.parquet:1": b"q"}


@pytest.mark.parametrize("key", ["text", "id"])
def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path, key: str) -> None:
    names = ["text", "id", key]
    table = pa.Table.from_arrays([pa.array(["x"])] * 3, names=names)
    pq.write_table(table, tmp_path / "a.parquet")
    message = rf"a\.parquet has 2 columns named '{key}' \(see corpus\.{key}_key\)"
    with pytest.raises(BadInput, match=message):
        read_all(CorpusConfig(reader="parquet", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("column", "kind"),
    [(pa.array([["x"]]), "list<"), (pa.array([{"a": "x"}]), "struct<a: string>"), (pa.array([1.5]), "double")],
)
def test_a_parquet_text_column_of_another_type_is_named_with_its_type(tmp_path: Path, column, kind: str) -> None:
    corpus = parquet_file(tmp_path / "a.parquet", {"text": column})
    with pytest.raises(BadInput, match=rf"a\.parquet: column 'text' must hold text, found {kind}"):
        read_all(corpus)


def test_corrupt_parquet_data_are_named_by_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    corpus = parquet_file(path, {"text": pa.array([f"{number} text " * 50 for number in range(6)])})
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0)
    first = start.dictionary_page_offset or start.data_page_offset
    content[first + 20 : first + start.total_compressed_size] = b"\xff" * (start.total_compressed_size - 20)
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"a\.parquet cannot be read near row 3: "):
        read_all(corpus)


def test_bad_bytes_in_a_parquet_string_column_reach_the_policy(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"b\xffd"]).view(pa.string())
    corpus = parquet_file(tmp_path / "a.parquet", {"text": column, "id": pa.array([b"x", b"\xff"]).view(pa.string())})
    documents = read_all(corpus)
    assert [(document.id, decode(document, "skip").why) for document in documents] == [
        ("x", None),
        ("\\xff", "invalid_utf8"),
    ]


def test_a_parquet_file_without_the_column_or_with_numbers_in_it_is_named(tmp_path: Path) -> None:
    corpus = parquet_file(tmp_path / "a.parquet", {"body": pa.array(["x"]), "title": pa.array(["y"])})
    with pytest.raises(BadInput, match=r"a\.parquet has no column 'text'; found 'body', 'title'"):
        read_all(corpus)
    corpus = parquet_file(tmp_path / "b.parquet", {"text": pa.array([1, 2])})
    with pytest.raises(BadInput, match=r"b\.parquet: column 'text' must hold text, found int64"):
        read_all(corpus)
    (tmp_path / "c.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match=r"c\.parquet is not a Parquet file"):
        read_all(CorpusConfig(reader="parquet", path=str(tmp_path / "c.parquet")))


def test_a_last_line_that_goes_on_since_it_was_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "y"}')
    corpus = CorpusConfig(reader="jsonl", path=str(tmp_path))
    (unit,) = listed(corpus, EVERYTHING)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "y"}  \n')
    with pytest.raises(BadInput, match="changed while it was read: a line ends at byte 30, not 27"):
        list(read_one(corpus, unit))
