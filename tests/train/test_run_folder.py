"""A run folder belongs to one configuration, and its lines end where its checkpoint does."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from brt_dist.data.errors import BadInput
from brt_dist.run_config import RunConfig
from brt_dist.train.run_folder import CONFIG, FREE_KEYS, check_run_folder, drop_lines_after, read_stream, write_config

STREAM = {"shards": "a", "plan": "b"}


@pytest.fixture
def resolved() -> dict[str, dict[str, Any]]:
    return RunConfig().as_dict()


def changed(resolved: dict[str, dict[str, Any]], dotted: str, value: Any) -> dict[str, dict[str, Any]]:
    section, key = dotted.split(".")
    other = deepcopy(resolved)
    assert key in other[section]
    other[section][key] = value
    return other


def test_a_written_configuration_is_taken_as_the_same(tmp_path: Path, resolved: dict[str, dict[str, Any]]):
    write_config(tmp_path / "run", resolved, STREAM)
    check_run_folder(tmp_path / "run", resolved)
    assert yaml.safe_load((tmp_path / "run" / CONFIG).read_text()) == resolved
    assert {path.name for path in (tmp_path / "run").iterdir()} == {CONFIG, "stream.json"}


def test_a_folder_without_a_run_fits_every_configuration(tmp_path: Path, resolved: dict[str, dict[str, Any]]):
    check_run_folder(tmp_path / "not there", resolved)
    check_run_folder(tmp_path, resolved)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.dim", 77), ("data.lanes", 16), ("optimizer.betas", [0.8, 0.9]), ("train.seed", 3), ("train.clip_norm", 9)],
)
def test_what_decides_the_result_must_not_differ(
    tmp_path: Path, resolved: dict[str, dict[str, Any]], key: str, value: Any
):
    section, name = key.split(".")
    write_config(tmp_path, resolved, STREAM)
    with pytest.raises(BadInput) as caught:
        check_run_folder(tmp_path, changed(resolved, key, value))
    assert f"{key} is {resolved[section][name]} there and {value} here" in str(caught.value)
    assert str(caught.value).count("there and") == 1


@pytest.mark.parametrize("key", [*FREE_KEYS, "parallel.micro_batches", "parallel.zero_stage", "run.dir", "corpus.path"])
def test_what_does_not_decide_it_may(tmp_path: Path, resolved: dict[str, dict[str, Any]], key: str):
    write_config(tmp_path, resolved, STREAM)
    check_run_folder(tmp_path, changed(resolved, key, "something else"))


def test_a_key_that_is_newer_than_the_run_had_its_default(tmp_path: Path, resolved: dict[str, dict[str, Any]]):
    older = deepcopy(resolved)
    del older["optimizer"]["schedule"], older["optimizer"]["betas"], older["model"]["feedback"]
    write_config(tmp_path, older, STREAM)
    check_run_folder(tmp_path, resolved)
    with pytest.raises(BadInput, match=r"optimizer\.schedule is cosine there and rsqrt here"):
        check_run_folder(tmp_path, changed(resolved, "optimizer.schedule", "rsqrt"))


@pytest.mark.parametrize("text", ["model: [", "- 1", "just words", "model: 5"])
def test_a_configuration_that_cannot_be_read_leaves_the_folder_alone(
    tmp_path: Path, resolved: dict[str, dict[str, Any]], text: str
):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(BadInput, match="is left alone"):
        check_run_folder(tmp_path, resolved)
    assert (tmp_path / CONFIG).read_text() == text


def test_lines_behind_a_step_and_torn_lines_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 6)]
    path.write_text("\n".join([*lines, '{"step": 2, "lo']))
    drop_lines_after(path, 3)
    assert path.read_text() == "".join(f"{line}\n" for line in lines[:3])


def test_lines_of_a_run_that_begins_again_are_all_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    drop_lines_after(path, 0)
    assert path.read_text() == ""
    drop_lines_after(tmp_path / "not there", 0)
    assert not (tmp_path / "not there").exists()


def test_the_stream_of_a_run_is_read_as_it_was_written(tmp_path: Path, resolved: dict[str, dict[str, Any]]):
    assert read_stream(tmp_path) is None
    write_config(tmp_path, resolved, STREAM)
    assert read_stream(tmp_path) == STREAM
    (tmp_path / "stream.json").write_text("{}")
    with pytest.raises(BadInput, match=r"stream\.json cannot be read"):
        read_stream(tmp_path)
