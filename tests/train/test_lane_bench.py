"""`brt bench lanes`: figures of a plan and of reading, of shards or of synthetic documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from brt_dist.cli import main
from brt_dist.data.lanes import plan_lanes
from brt_dist.data.token_shards import TokenShards
from brt_dist.train.lane_bench import SyntheticDocuments

MIXED = "data.weights={books: 3, code: 1}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    settings: dict[str, Any] = {"model": {"window": 8}, "data": {"segment": 32, "lanes": 4}}
    path.write_text(yaml.safe_dump(settings))
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", "lanes", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_of_shards_it_tells_their_documents_and_their_padding(
    config: Path, shards: Path, capsys: pytest.CaptureFixture[str]
):
    found = told(capsys, str(config), f"data.shards={shards}")
    lengths = TokenShards.open(shards).split("train").lengths
    assert (found["documents"], found["lanes"], found["mixed"]) == (len(lengths), 4, False)
    assert found["padding"] == plan_lanes(lengths, 4, 32, 8).padding
    assert found["positions"] == int((lengths // 8 + 1).sum() * 8) // (4 * 32) + 1
    assert found["read_tokens_per_second"] > 0
    assert found["peak_memory"] >= found["memory_before"] > 0


def test_synthetic_documents_need_no_shards_and_may_be_mixed(config: Path, capsys: pytest.CaptureFixture[str]):
    plain = told(capsys, str(config), "--documents", "200", "--lanes", "3")
    mixed = told(capsys, str(config), MIXED, "--documents", "200", "--lanes", "3")
    assert (plain["documents"], plain["corpora"], plain["lanes"], plain["mixed"]) == (200, 1, 3, False)
    assert (mixed["documents"], mixed["corpora"], mixed["mixed"]) == (200, 2, True)
    assert plain["padding"] != mixed["padding"]


def test_synthetic_documents_are_the_same_in_every_process():
    one, two = SyntheticDocuments(50, ("a", "b")), SyntheticDocuments(50, ("a", "b"))
    assert (one.lengths == two.lengths).all()
    assert [len(one.tokens(index)) for index in range(50)] == one.lengths.tolist()
    assert (one.tokens(3, 5, 4) == one.tokens(3)[5:9]).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "data.shards is not set"), ([MIXED, "--documents", "1"], "1 documents are too few for the 2 corpora")],
)
def test_without_documents_it_says_what_to_give(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
):
    assert main(["bench", "lanes", str(config), *arguments]) == 2
    assert said in capsys.readouterr().err
