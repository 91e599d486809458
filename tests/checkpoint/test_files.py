"""A checkpoint is whole or not there, is found without a pointer, and its carry fits every division of the lanes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from brt_dist.checkpoint.files import (
    FACTS,
    OPTIMIZER,
    PARAMETERS,
    CheckpointError,
    begin,
    carry_file,
    damage,
    finish,
    folder_of,
    load_carry,
    load_optimizer,
    load_parameters,
    mismatch,
    newest_checkpoint,
    read_facts,
    write_tensors,
)
from brt_dist.model.carry import Carry, LayerCarry

PARAMETER = torch.arange(6.0).view(2, 3)


def carry_of(lanes: range) -> dict[str, Tensor]:
    """Every value of a lane's carry tells the lane's number; the cache is bfloat16 and the state float32."""
    number_B = torch.tensor(list(lanes), dtype=torch.float32)
    cache = number_B.view(-1, 1, 1, 1).expand(-1, 4, 2, 3).to(torch.bfloat16)
    layers = (LayerCarry(cache, cache + 100), LayerCarry(cache, cache, number_B.view(-1, 1, 1).expand(-1, 5, 6)))
    return Carry(layers).detach().tensors()


def save(run: Path, step: int, groups: tuple[range, ...] = (range(0, 4), range(4, 8))) -> Path:
    partial = begin(run, step)
    for lanes in groups:
        write_tensors(partial, carry_file(lanes), carry_of(lanes))
    write_tensors(partial, PARAMETERS, {"a.weight": PARAMETER + step})
    write_tensors(partial, OPTIMIZER, {"a.weight/exp_avg": PARAMETER.T})
    return finish(partial, {"step": step, "position": step, "plan": "abc"})


def test_what_was_saved_is_loaded_by_name(tmp_path: Path):
    folder = save(tmp_path, 6)
    assert folder == folder_of(tmp_path, 6) == tmp_path / "checkpoints" / "step-00000006"
    assert torch.equal(load_parameters(folder)["a.weight"], PARAMETER + 6)
    assert torch.equal(load_optimizer(folder)["a.weight/exp_avg"], PARAMETER.T)
    facts = read_facts(folder)
    assert {name: facts[name] for name in ("step", "position", "plan")} == {"step": 6, "position": 6, "plan": "abc"}


def test_parameters_and_moments_that_had_other_names_in_the_first_version_are_found_under_todays(tmp_path: Path):
    then = ["layers.1.cell.gate.bias_D", "layers.1.cell.update.weight", "layers.1.cell.norm.weight"]
    today = [
        "layers.1.cell.update.gate.bias_D",
        "layers.1.cell.update.gate.candidate.weight",
        "layers.1.cell.norm.weight",
    ]
    moments = ("exp_avg", "exp_avg_sq")
    folder = begin(tmp_path, 6)
    write_tensors(folder, PARAMETERS, {name: PARAMETER + index for index, name in enumerate(then)})
    write_tensors(folder, OPTIMIZER, {f"{name}/{moment}": PARAMETER.clone() for name in then for moment in moments})
    loaded = load_parameters(folder)
    assert loaded.keys() == set(today)
    for index, name in enumerate(today):
        assert torch.equal(loaded[name], PARAMETER + index)
    assert load_optimizer(folder).keys() == {f"{name}/{moment}" for name in today for moment in moments}
    write_tensors(folder, PARAMETERS, loaded)
    assert load_parameters(folder).keys() == set(today)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"a": (2, 3), "b": (4,)}, None),
        ({"a": (2, 3), "b": (4,), "c": (1,)}, "lacks c"),
        ({"a": (2, 3)}, "has besides b"),
        ({"c": (1,), "d": (1,), "e": (1,), "b": (4,)}, "lacks c (2 more tensors) and has besides a"),
        ({"a": (3, 2), "b": (4,)}, "has a of shape (2, 3) instead of (3, 2)"),
    ],
)
def test_a_mismatch_names_what_lacks_what_is_too_much_and_other_shapes(
    wanted: dict[str, tuple[int, ...]], told: str | None
):
    held = {"a": torch.Size((2, 3)), "b": torch.Size((4,))}
    assert mismatch(held, {name: torch.Size(shape) for name, shape in wanted.items()}) == told


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_carry_that_two_ranks_wrote_is_read_in_any_division_of_the_lanes(tmp_path: Path, size: int):
    folder = save(tmp_path, 1)
    for first in range(0, 8, size):
        lanes = range(first, min(first + size, 8))
        read, expected = load_carry(folder, lanes), carry_of(lanes)
        assert read.keys() == expected.keys()
        for name, tensor in expected.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor), name


def test_file_names_sort_as_numbers_beyond_their_digits(tmp_path: Path):
    groups = (range(0, 99_998), range(99_998, 100_002))
    folder = begin(tmp_path, 1)
    for lanes in groups:
        write_tensors(folder, carry_file(lanes), {"x": torch.tensor(list(lanes))})
    assert load_carry(folder, range(99_997, 100_001))["x"].tolist() == [99_997, 99_998, 99_999, 100_000]


def test_a_lane_that_nobody_wrote_is_named(tmp_path: Path):
    folder = save(tmp_path, 1, groups=(range(0, 4), range(6, 8)))
    assert set(load_carry(folder, range(6, 8))) == set(carry_of(range(1)))
    with pytest.raises(CheckpointError, match="no carry of lane 4"):
        load_carry(folder, range(2, 8))
    with pytest.raises(CheckpointError, match="no carry of lane 8"):
        load_carry(folder, range(6, 9))


def test_a_crash_before_the_end_leaves_the_older_checkpoint_the_newest(tmp_path: Path):
    older = save(tmp_path, 3)
    partial = begin(tmp_path, 6)
    write_tensors(partial, PARAMETERS, {"a.weight": PARAMETER})
    assert newest_checkpoint(tmp_path) == older
    (partial / FACTS).write_text("{}")
    assert newest_checkpoint(tmp_path) == older
    assert load_parameters(save(tmp_path, 6))["a.weight"][0, 0] == 6
    assert newest_checkpoint(tmp_path) == folder_of(tmp_path, 6)
    assert not partial.exists()


def test_what_an_earlier_crash_left_does_not_get_into_the_checkpoint(tmp_path: Path):
    write_tensors(begin(tmp_path, 6), carry_file(range(0, 8)), carry_of(range(0, 8)))
    folder = save(tmp_path, 6)
    assert not (folder / carry_file(range(0, 8))).exists()
    assert damage(folder) is None


def test_the_newest_is_the_one_of_the_highest_step_whatever_was_written_last(tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    newest = save(tmp_path, 100)
    save(tmp_path, 20)
    (tmp_path / "checkpoints" / "step-99999999.txt").write_text("")
    (tmp_path / "checkpoints" / "step-latest").mkdir()
    assert newest_checkpoint(tmp_path) == newest


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [PARAMETERS, OPTIMIZER, carry_file(range(4, 8)), FACTS])
@pytest.mark.parametrize("hurt", [truncate, alter, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_in_a_line_that_names_the_file(
    tmp_path: Path, name: str, hurt: Callable[[Path], None]
):
    older, newer = save(tmp_path, 3), save(tmp_path, 6)
    hurt(newer / name)
    lines: list[str] = []
    assert newest_checkpoint(tmp_path, lines.append) == older
    assert len(lines) == 1
    assert lines[0].startswith("step-00000006 is passed over: ")
    assert name in lines[0]


@pytest.mark.parametrize("text", ["[]", "{}", "3", '{"files": {"a": 1}}', '{"step": 7}'])
def test_facts_of_another_kind_are_damage_and_no_crash(tmp_path: Path, text: str):
    folder = save(tmp_path, 3)
    (folder / FACTS).write_text(text)
    assert damage(folder) is not None
    with pytest.raises(CheckpointError):
        read_facts(folder)


def test_a_step_that_was_edited_is_noticed(tmp_path: Path):
    folder = save(tmp_path, 3)
    (folder / FACTS).write_text((folder / FACTS).read_text().replace('"step": 3', '"step": 4'))
    assert FACTS in (damage(folder) or "")


def test_nothing_in_a_checkpoint_can_run_code(tmp_path: Path):
    folder = save(tmp_path, 6)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    for path in folder.glob("*.safetensors"):
        assert load_file(path)
    json.loads((folder / FACTS).read_text())


def test_equal_tensors_make_equal_bytes(tmp_path: Path):
    first, second = save(tmp_path / "a", 6), save(tmp_path / "b", 6)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_a_run_without_one_usable_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* can be used"):
        newest_checkpoint(tmp_path)


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("brt_dist.checkpoint.files.save_file", fail)
    with pytest.raises(CheckpointError, match=r"parameters\.safetensors cannot be written: .*No space"):
        write_tensors(tmp_path, "parameters.safetensors", {"a": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []
