"""Arrow files, datasets saved on disk, and what damage leaves of these and of Parquet files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import EVERYTHING, LENIENT, contents, left_out, listed, read_all
from pyarrow import ipc

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig

TEXTS = [f"é text {number} " * number for number in range(12)]
WHOLE = {str(number): text.encode() for number, text in enumerate(TEXTS)}
TABLE = pa.table({"more": TEXTS, "text": TEXTS, "id": pa.array(range(12))})
KINDS = ["file", "stream", "compressed"]


def write_arrow(path: Path, table: pa.Table, kind: str = "stream", rows: int = 3) -> CorpusConfig:
    options = ipc.IpcWriteOptions(compression="zstd" if kind == "compressed" else None)
    opened = ipc.new_stream if kind == "stream" else ipc.new_file
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, table.schema, options=options) as file:
        file.write_table(table, max_chunksize=rows)
    return CorpusConfig(reader="arrow", path=str(path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit_bytes", [1, 700, EVERYTHING])
def test_every_row_of_an_arrow_file_is_read_once_whatever_the_units(tmp_path: Path, kind: str, unit_bytes: int) -> None:
    corpus = write_arrow(tmp_path / "a.arrow", TABLE, kind)
    units = listed(corpus, unit_bytes)
    assert contents(corpus, unit_bytes) == WHOLE
    assert units.size == (tmp_path / "a.arrow").stat().st_size
    assert len(units) == {1: 4, EVERYTHING: 1}.get(unit_bytes, len(units))
    reached = [document.reached for document in read_all(corpus)]
    assert reached == sorted(reached)
    assert 0 < reached[0] < reached[-1] <= units.size


@pytest.mark.parametrize(
    "type", [pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_texts_of_every_type_are_read(tmp_path: Path, type: pa.DataType, kind: str) -> None:
    texts = ["é", None, "", "é"]
    column = pa.array([None if text is None else text.encode() for text in texts]) if type == pa.binary() else None
    column = pa.array(texts).cast(type) if column is None else column
    corpus = write_arrow(tmp_path / "a.feather", pa.table({"text": column}), kind, 4)
    expected = {f"a.feather:0:{row}": (text or "").encode() for row, text in enumerate(texts)}
    assert contents(CorpusConfig(reader="arrow", path=str(tmp_path))) == expected
    assert contents(corpus) == expected


def test_bad_bytes_in_an_arrow_string_column_reach_the_policy(tmp_path: Path) -> None:
    column = pa.array([b"fine", b"b\xffd"]).view(pa.string())
    assert list(contents(write_arrow(tmp_path / "a.arrow", pa.table({"text": column}))).values()) == [
        b"fine",
        b"b\xffd",
    ]


def test_an_arrow_file_without_the_column_is_named(tmp_path: Path) -> None:
    corpus = write_arrow(tmp_path / "a.arrow", pa.table({"body": ["x"]}))
    with pytest.raises(BadInput, match=r"a\.arrow has no column 'text'; found 'body'"):
        listed(corpus)


@pytest.mark.parametrize("unit_bytes", [1, EVERYTHING])
def test_an_arrow_stream_cut_short_keeps_the_batches_before_the_cut(tmp_path: Path, unit_bytes: int) -> None:
    corpus = write_arrow(tmp_path / "a.arrow", TABLE)
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[: len(content) - 300])
    with pytest.raises(BadInput, match=r"a\.arrow from batch 3 on: .*documents\.damaged: skip"):
        read_all(corpus, unit_bytes)
    assert contents(corpus, unit_bytes, LENIENT) == dict(list(WHOLE.items())[:9])
    assert [one.id for one in left_out(corpus, unit_bytes=unit_bytes)] == ["a.arrow:3"]


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_a_table_cut_short_is_left_out_as_a_whole_and_the_next_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    write_arrow(tmp_path / "b.arrow", TABLE, "file")
    pq.write_table(TABLE, tmp_path / "b.parquet")
    suffix = name.partition(".")[2]
    content = (tmp_path / f"b.{suffix}").read_bytes()
    corpus = CorpusConfig(reader="arrow" if suffix == "arrow" else "parquet", path=str(tmp_path))
    for short in (content[: len(content) // 2], content[:-1], content[:3], b""):
        (tmp_path / name).write_bytes(short)
        with pytest.raises(BadInput, match=rf"{name}.*documents\.damaged: skip"):
            read_all(corpus)
        assert contents(corpus, policy=LENIENT) == WHOLE
        assert [one.why for one in left_out(corpus)] == ["damaged"]


@pytest.mark.parametrize("unit_bytes", [1, EVERYTHING])
def test_a_corrupt_row_group_loses_its_rows_and_no_others(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, row_group_size=3, use_dictionary=False)
    content = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    for at in range(chunk.data_page_offset + 20, chunk.data_page_offset + chunk.total_compressed_size):
        content[at] = 0xFF
    path.write_bytes(content)
    corpus = CorpusConfig(reader="parquet", path=str(path))
    rest = {name: text for name, text in WHOLE.items() if name not in ("3", "4", "5")}
    assert contents(corpus, unit_bytes, LENIENT) == rest
    (lost,) = left_out(corpus, unit_bytes=unit_bytes)
    assert (lost.id, lost.source.partition(":")[0]) == ("a.parquet:3", "a.parquet cannot be read near row 3")
    assert lost.source.endswith("lost to row 5")


def test_a_changed_byte_is_found_where_the_parquet_file_has_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, use_dictionary=False, compression="none", write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"text 7 \xc3", b"test 7 \xc3"))
    assert [one.why for one in left_out(CorpusConfig(reader="parquet", path=str(path)))] == ["damaged"]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_offsets_that_lead_out_of_an_arrow_batch_lose_that_batch_alone(tmp_path: Path, kind: str) -> None:
    offsets = pa.py_buffer(b"\0\0\0\0\x05\0\0\0\xff\xff\xff\x7f\x06\0\0\0")
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abcdef")])
    batches = [pa.record_batch({"text": column}) for column in (pa.array(["x"]), bad, pa.array(["y"]))]
    opened = ipc.new_stream if kind == "stream" else ipc.new_file
    with opened(tmp_path / "a.arrow", batches[0].schema) as file:
        for batch in batches:
            file.write_batch(batch)
    corpus = CorpusConfig(reader="arrow", path=str(tmp_path))
    assert list(contents(corpus, policy=LENIENT).values()) == [b"x", b"y"]
    assert [one.id for one in left_out(corpus)] == ["a.arrow:1"]


@pytest.mark.parametrize("kind", ["parquet", *KINDS])
def test_a_row_that_is_too_long_is_left_out_by_its_id(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        pq.write_table(TABLE, tmp_path / "a.parquet")
        corpus = CorpusConfig(reader="parquet", path=str(tmp_path))
    else:
        corpus = write_arrow(tmp_path / "a.arrow", TABLE, kind)
    policy = DocumentsConfig(max_bytes=50, too_long="skip")
    short = {name: text for name, text in WHOLE.items() if len(text) <= 50}
    assert contents(corpus, policy=policy) == short
    assert [one.id for one in left_out(corpus, policy)] == [name for name in WHOLE if name not in short]


def save_dataset(folder: Path, table: pa.Table, files: int = 2) -> None:
    """As the library `datasets` does with save_to_disk."""
    names = [f"data-{number:05d}-of-{files:05d}.arrow" for number in range(files)]
    for number, name in enumerate(names):
        share = -(-len(table) // files)
        write_arrow(folder / name, table.slice(number * share, share))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def save_splits(folder: Path, splits: dict[str, pa.Table]) -> CorpusConfig:
    for name, table in splits.items():
        save_dataset(folder / name, table)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return CorpusConfig(reader="huggingface", path=str(folder))


@pytest.mark.parametrize("unit_bytes", [1, EVERYTHING])
def test_a_saved_dataset_is_read_without_the_files_left_over_beside_it(tmp_path: Path, unit_bytes: int) -> None:
    save_dataset(tmp_path, TABLE)
    write_arrow(tmp_path / "cache-1234.arrow", TABLE)
    corpus = CorpusConfig(reader="huggingface", path=str(tmp_path))
    assert contents(corpus, unit_bytes) == WHOLE
    assert {document.split for document in read_all(corpus, unit_bytes)} == {None}


def test_the_splits_of_a_saved_dataset_are_those_of_its_documents(tmp_path: Path) -> None:
    tables = {"train": TABLE[:4], "validation": TABLE[4:6], "test": TABLE[6:9], "extra": TABLE[9:]}
    corpus = save_splits(tmp_path, tables)
    said: list[str] = []
    listed(corpus, say=said.append)
    assert said == [f"split 'extra' of {tmp_path}/extra is taken for training"]
    found = {document.id: document.split for document in read_all(corpus, 1)}
    assert found == {
        **{str(number): "train" for number in (0, 1, 2, 3, 9, 10, 11)},
        **{str(number): "validation" for number in (4, 5)},
        **{str(number): "test" for number in (6, 7, 8)},
    }


def test_a_saved_dataset_that_holds_nothing_back_leaves_the_split_open(tmp_path: Path) -> None:
    corpus = save_splits(tmp_path, {"train": TABLE[:4], "more": TABLE[4:]})
    assert {document.split for document in read_all(corpus)} == {None}


def test_a_saved_dataset_without_one_of_its_files_or_without_state_is_refused(tmp_path: Path) -> None:
    save_dataset(tmp_path, TABLE)
    corpus = CorpusConfig(reader="huggingface", path=str(tmp_path))
    (tmp_path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(BadInput, match=r"data-00001-of-00002\.arrow is missing"):
        listed(corpus)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(BadInput, match=r"state\.json is not valid JSON"):
        listed(corpus)
    (tmp_path / "state.json").unlink()
    with pytest.raises(BadInput, match=r"has no state\.json: it was not written by save_to_disk"):
        listed(corpus)
