"""Under mpiexec the result is that of one process, to the byte; also when ranks are killed, or find something wrong."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import psutil
import pytest
import yaml
from prepare_runs import SENTENCE
from processes import finish, run, start

from brt_dist.data.token_shards import TokenShards

UNITS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of two corpora, with texts that stand in both, and what one process makes of it in `alone`."""
    tmp_path = tmp_path_factory.mktemp("ranks")
    draw = random.Random(0)
    words = SENTENCE.split(" ")
    for corpus, count in (("prose", 40), ("code", 20)):
        (tmp_path / corpus).mkdir()
        for number in range(count):
            text = " ".join(draw.choices(words, k=draw.randrange(5, 4000)))
            (tmp_path / corpus / f"{number:02}.txt").write_text(text)
    for number in range(5):
        (tmp_path / "code" / f"copy{number}.txt").write_bytes((tmp_path / "prose" / f"0{number}.txt").read_bytes())
    settings = {
        "corpora": {name: {"path": str(tmp_path / name)} for name in ("prose", "code")},
        "documents": {"duplicates": "drop"},
        "tokenizer": {"vocab_size": 330},
        "shards": {"dir": str(tmp_path / "alone"), "unit_bytes": 20_000},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    done = run("python", 1, program(tmp_path, "alone"))
    assert done.returncode == 0, done.stderr
    return tmp_path


def program(folder: Path, name: str, *overrides: str) -> list[str]:
    return ["-m", "brt_dist", "prepare", str(folder / "run.yaml"), f"shards.dir={folder / name}", *overrides]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished_units(folder: Path) -> int:
    ledger = folder / "units.jsonl"
    return ledger.read_text().count('{"unit": ') if ledger.exists() else 0


def test_three_ranks_make_the_bytes_of_one(folder: Path):
    done = run("mpiexec", 3, program(folder, "three"))
    assert done.returncode == 0, done.stderr
    assert files(folder / "three") == files(folder / "alone")
    assert len(TokenShards.open(folder / "three").manifest["shards"]) > UNITS
    # One rank speaks for all.
    assert done.stdout.count("bytes per token") == 1
    again = run("mpiexec", 2, program(folder, "three"))
    assert again.returncode == 0
    assert again.stdout.count("nothing to do") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_whose_rank_is_killed_ends_and_goes_on_to_the_bytes_of_an_unbroken_one(folder: Path, victim: int):
    killed = folder / f"killed {victim}"
    for round_ in (1, 2):
        process = start("mpiexec", 2, program(folder, killed.name))
        _wait_for_units(killed, finished_units(killed) + 2)
        _rank(process.pid, victim).kill()
        assert finish(process, timeout=60).returncode != 0
        assert not (killed / "manifest.json").exists()
        assert finished_units(killed) >= 2 * round_
    kept = finished_units(killed)
    last = run("python", 1, program(folder, killed.name))
    assert last.returncode == 0, last.stderr
    assert f"{kept} of " in last.stdout
    assert files(killed) == files(folder / "alone")


def _wait_for_units(folder: Path, count: int) -> None:
    end = time.monotonic() + 100
    while finished_units(folder) < count:
        assert time.monotonic() < end, f"{folder} has {finished_units(folder)} units and not {count}"
        time.sleep(0.005)


def _rank(launcher: int, rank: int) -> psutil.Process:
    """The process that mpiexec started as `rank`."""
    started = psutil.Process(launcher).children(recursive=True)
    return next(each for each in started if each.environ().get("PMI_RANK") == str(rank))


def test_a_document_that_any_rank_cannot_take_ends_all_ranks_in_one_line_and_costs_nothing_that_is_finished(
    folder: Path,
):
    """The survey sees it first; here it went bad behind it."""
    process = start("mpiexec", 2, program(folder, "bad"))
    _wait_for_units(folder / "bad", 2)
    _rank(process.pid, 0).suspend()
    bad = folder / "code" / "19.txt"
    content = bad.read_bytes()
    bad.write_bytes(b"\xff" + content[1:])
    _rank(process.pid, 0).resume()
    done = finish(process, timeout=60)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("brt:")]
    assert len(lines) == 1
    assert "'code/19.txt' is not valid UTF-8" in lines[0]
    assert "Traceback" not in done.stderr
    bad.write_bytes(content)
    mended = run("mpiexec", 2, program(folder, "bad"))
    assert mended.returncode == 0, mended.stderr
    assert files(folder / "bad") == files(folder / "alone")


def test_what_is_wrong_with_the_settings_is_one_line_for_all_ranks(folder: Path):
    done = run("mpiexec", 3, program(folder, "alone", "splits.test=0.5"))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("brt:")]
    assert len(lines) == 1
    assert "splits.test is 0.1 there and 0.5 here" in lines[0]
    manifest = json.loads((folder / "alone" / "manifest.json").read_text())
    assert manifest["corpora"].keys() == {"prose", "code"}
