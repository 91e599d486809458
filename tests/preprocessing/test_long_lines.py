"""Compressed JSON Lines, what damage leaves of them, and lines too long to be held."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from corpus_files import EVERYTHING, LENIENT, contents, left_out, read_all
from hypothesis import given, settings
from hypothesis import strategies as st

from brt_dist.data.errors import BadInput
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.readers import jsonl, long_line

TEXTS = {f"n{number}": f"é{number} " * number for number in range(1, 40)}
LINES = [json.dumps({"id": name, "text": text}).encode() + b"\n" for name, text in TEXTS.items()]
WHOLE = {name: text.encode() for name, text in TEXTS.items()}


def zstd(content: bytes) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as file:
        file.write(content)
    return stream.getvalue().to_pybytes()


PACK = {"a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstd}


def corpus_of(path: Path, content: bytes) -> CorpusConfig:
    path.write_bytes(content)
    return CorpusConfig(reader="jsonl", path=str(path.parent))


@pytest.mark.parametrize("unit_bytes", [1, EVERYTHING])
@pytest.mark.parametrize("pieces", [1, 3, 39])
@pytest.mark.parametrize("name", PACK)
def test_compressed_lines_are_those_of_the_plain_file(tmp_path: Path, name: str, pieces: int, unit_bytes: int) -> None:
    packed = b"".join(PACK[name](b"".join(LINES[piece::pieces])) for piece in range(pieces))
    assert contents(corpus_of(tmp_path / name, packed), unit_bytes) == WHOLE


def test_a_compressed_line_without_an_id_is_named_by_its_place_in_the_text(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n\n{"text": "y"}'))
    assert contents(corpus) == {"a.jsonl.gz@0": b"x", "a.jsonl.gz@15": b"y"}


def test_a_bad_line_of_a_compressed_file_is_named_by_its_number(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "x"}\n\n{"text": 1}\n{"text": "y"}\n'))
    with pytest.raises(BadInput, match=r"a\.jsonl\.gz line 3: 'text' must be a string"):
        read_all(corpus)
    assert list(contents(corpus, policy=LENIENT).values()) == [b"x", b"y"]
    assert [(one.id, one.why) for one in left_out(corpus)] == [("a.jsonl.gz@15", "damaged")]


def test_bad_lines_are_left_out_by_name_and_the_others_are_read(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a.jsonl", b'{"text": "x"}\n{"text"\n[]\n{"id": 3}\n{"text": "y", "id": "y"}\n')
    for unit_bytes in (1, EVERYTHING):
        assert contents(corpus, unit_bytes, LENIENT) == {"a.jsonl@0": b"x", "y": b"y"}
        found = left_out(corpus, unit_bytes=unit_bytes)
        assert [one.source.split(":")[0] for one in found] == [
            f"a.jsonl bytes {range}" for range in ("14 to 22", "22 to 25", "25 to 35")
        ]


@pytest.mark.parametrize("name", PACK)
def test_a_compressed_file_cut_short_keeps_the_lines_before_the_cut(tmp_path: Path, name: str) -> None:
    packed = [PACK[name](b"".join(LINES[:20])), PACK[name](b"".join(LINES[20:]))]
    corpus = corpus_of(tmp_path / name, b"".join(packed)[: len(packed[0]) + 30])
    with pytest.raises(BadInput, match=rf"{name}: lost from line \d+ on .*(middle of a gzip|Truncated)"):
        read_all(corpus)
    kept = contents(corpus, policy=LENIENT)
    assert list(WHOLE.items())[: len(kept)] == list(kept.items())
    assert 20 <= len(kept) < 39
    (lost,) = left_out(corpus)
    end = sum(map(len, LINES[: len(kept)]))
    assert f"lost from line {len(kept) + 1} on (byte {end} of its text" in lost.source
    assert lost.why == "damaged"


@pytest.mark.parametrize("cut", [40, 2000])
@pytest.mark.parametrize("name", PACK)
def test_a_line_that_the_cut_goes_through_is_lost_and_counted_once(tmp_path: Path, name: str, cut: int) -> None:
    texts = [random.Random(number).randbytes(40_000).hex() for number in range(10)]
    packed = PACK[name](b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))
    corpus = corpus_of(tmp_path / name, packed[:-cut])
    kept = list(contents(corpus, policy=LENIENT).values())
    assert kept == [text.encode() for text in texts[: len(kept)]]
    assert 7 <= len(kept) <= 9
    assert len(left_out(corpus)) == 1


def test_a_gzip_member_whose_checksum_differs_loses_all_its_lines_but_not_those_before(tmp_path: Path) -> None:
    packed = [gzip.compress(b"".join(lines)) for lines in (LINES[:20], LINES[20:30], LINES[30:])]
    damaged = bytearray(packed[1])
    damaged[-6] ^= 1
    corpus = corpus_of(tmp_path / "a.jsonl.gz", packed[0] + bytes(damaged) + packed[2])
    with pytest.raises(BadInput, match="incorrect data check"):
        read_all(corpus)
    assert contents(corpus, policy=LENIENT) == dict(list(WHOLE.items())[:20])
    assert [one.why for one in left_out(corpus)] == ["damaged"]


@pytest.mark.parametrize("content", [b"", b"no gzip at all", b"\0" * 100])
def test_what_is_no_compressed_file_is_named(tmp_path: Path, content: bytes) -> None:
    for name in PACK:
        corpus = corpus_of(tmp_path / name, content)
        assert contents(corpus, policy=LENIENT) == {}
        assert left_out(corpus)[0].source.startswith(f"{name}: lost from line 1 on")
        (tmp_path / name).unlink()


def shrink(monkeypatch: pytest.MonkeyPatch, held: int, piece: int, frame: int = 10**6) -> None:
    """Let lines be long that have few bytes."""
    monkeypatch.setattr(jsonl, "_HELD", held)
    monkeypatch.setattr(jsonl, "_PIECE", piece)
    monkeypatch.setattr(long_line, "_PIECE", piece)
    monkeypatch.setattr(long_line, "_FRAME", frame)


HARD = st.text(alphabet=st.sampled_from('aé\\"\n\r\t\0\u2581😀}{[]:,\u2028u/')) | st.text()


# No deadline: files are written, and a busy machine takes its time over them.
@settings(deadline=None)
@given(texts=st.lists(HARD, min_size=1, max_size=5), ascii=st.booleans(), held=st.integers(2, 40))
def test_a_line_read_in_pieces_is_the_line_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ascii: bool, held: int
) -> None:
    lines = [
        json.dumps({"a": {"text": text[::-1]}, "text": text, "list": [text, {}], "id": number}, ensure_ascii=ascii)
        for number, text in enumerate(texts)
    ]
    corpus = corpus_of(tmp_path_factory.mktemp("lines") / "a.jsonl", "\n".join(lines).encode())
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch, held, 13)
        found = [document.content.decode() for document in read_all(corpus)]
    assert found == texts


@pytest.mark.parametrize("held", [3, 20])
@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\\xaaaaaaaaaaaaaaaaaaa"}',
        b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\\u12"}',
        b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\\u12xyaaaaaaaaaaaaaaaaaaaaa"}',
        b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',
        b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\taaaaaaaa"}',
        b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"',
        b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}}',
        b'["text", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]',
        b'{"text": ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"]}',
        b'{"text": "x", "id": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}',
        b"\0" * 100,
    ],
)
def test_a_bad_long_line_is_left_out_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, held: int
) -> None:
    corpus = corpus_of(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    shrink(monkeypatch, held, 16)
    assert list(contents(corpus, policy=LENIENT).values()) == [b"one", b"two"]
    assert [(one.id, one.why) for one in left_out(corpus)] == [("a.jsonl@16", "damaged")]


@pytest.mark.parametrize(("bad", "why"), [(b"\xff", "invalid"), (b"\\ud83d", "half a pair"), (b"\\udc80", "half")])
def test_bad_bytes_in_a_long_line_reach_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes, why: str
) -> None:
    corpus = corpus_of(tmp_path / "a.jsonl", b'{"text": "' + b"a" * 50 + bad + b"a" * 50 + b'"}\n')
    at_once = contents(corpus)
    shrink(monkeypatch, 16, 16)
    assert contents(corpus) == at_once
    with pytest.raises(UnicodeDecodeError):
        at_once["a.jsonl@0"].decode()


def test_the_last_of_two_texts_in_one_line_counts_as_in_any_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpus_of(
        tmp_path / "a.jsonl", b'{"text": "%s", "text": "y"}\n{"text": "y", "text": "%s"}' % ((b"x" * 99,) * 2)
    )
    shrink(monkeypatch, 16, 16)
    assert list(contents(corpus).values()) == [b"y", b"x" * 99]


def test_a_text_is_too_long_by_its_own_bytes_and_not_by_those_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        {"id": "fits", "more": "m" * 200, "text": "é" * 10},
        {"id": "long", "text": "é" * 10 + "x"},
        {"text": "é" * 100, "id": "late"},
        {"id": "numbers", "list": list(range(200)), "text": "x"},
    ]
    corpus = corpus_of(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    shrink(monkeypatch, 48, 32, frame=300)
    policy = DocumentsConfig(max_bytes=20, too_long="skip")
    assert contents(corpus, policy=policy) == {"fits": "é".encode() * 10}
    found = [(one.id, one.why) for one in left_out(corpus, policy)]
    assert found[0] == ("long", "too_long")
    assert [why for _, why in found] == ["too_long"] * 3
    with pytest.raises(
        BadInput, match=r"a\.jsonl line 2: .*20 (bytes )?of documents\.max_bytes.*documents\.too_long: skip"
    ):
        read_all(corpus, policy=DocumentsConfig(max_bytes=20))


READ = """
import sys
from preprocessing.config import CorpusConfig, DocumentsConfig
from preprocessing.corpora import list_units, read_unit
corpora = {"": CorpusConfig(reader="jsonl", path=sys.argv[1])}
policy = DocumentsConfig(damaged="skip", too_long="skip", max_bytes=int(sys.argv[2]))
for unit in list_units(corpora, 64_000_000):
    for one in read_unit(corpora, unit, policy):
        print(type(one).__name__, one.id, len(getattr(one, "content", b"")))
# Not what getrusage tells: that counts what the process that started this one held.
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def read_apart(path: Path, max_bytes: int) -> tuple[list[str], int]:
    """What another process finds in a file, and the MiB that it needs at most."""
    command = [sys.executable, "-c", READ, str(path), str(max_bytes)]
    *found, most = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return found, int(most)


def line_of(path: Path, filled: int, size: int) -> None:
    """A line of `size` bytes, of which the first `filled` are text and the others a hole, and a short one behind it."""
    with path.open("wb") as file:
        file.write(b'{"id": "long", "text": "')
        for _ in range(filled >> 20):
            file.write(b"0123456789abcdef" * (1 << 16))
        file.seek(size)
        file.write(b'"}\n{"id": "next", "text": "short"}\n')


def test_a_line_far_too_long_is_never_held(tmp_path: Path) -> None:
    line_of(tmp_path / "a.jsonl", 24 << 20, 600 << 20)
    found, most = read_apart(tmp_path / "a.jsonl", 1 << 20)
    assert found == ["LeftOut long 0", "Document next 5"]
    assert most < 300


@pytest.mark.long
def test_a_line_of_two_gigabytes_is_never_held(tmp_path: Path) -> None:
    line_of(tmp_path / "a.jsonl", 140 << 20, 2 << 30)
    found, most = read_apart(tmp_path / "a.jsonl", 134_217_728)
    assert found == ["LeftOut long 0", "Document next 5"]
    assert most < 700


@pytest.mark.long
def test_the_longest_text_that_is_allowed_takes_less_than_a_gigabyte(tmp_path: Path) -> None:
    line_of(tmp_path / "a.jsonl", 127 << 20, (127 << 20) + len('{"id": "long", "text": "'))
    found, most = read_apart(tmp_path / "a.jsonl", 134_217_728)
    assert found == [f"Document long {127 << 20}", "Document next 5"]
    assert most < 700
