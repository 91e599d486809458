"""The billion-parameter configurations: they fit their GPUs, and what the README says of them is what is computed."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from fake_ranks import fake_tensor_ranks
from no_memory import NoMemory

from brt_dist.model.flops import head_flops, layer_flops
from brt_dist.parallel.memory import RankMemory, memory_of_rank
from brt_dist.parallel.parallelize import cut_by_heads, whole_shapes
from brt_dist.parallel.stage import Stage
from brt_dist.parallel.stages import divide_layers
from brt_dist.parallel.tensor_parallel import cut_of, cuts, share_shape
from brt_dist.run_config import RunConfig, load_run_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SCALE = CONFIGS / "scale"
RUNS = {path.stem: path for path in sorted(SCALE.glob("*.yaml"))}
SIZES, WORLDS = ("1300m", "7b", "13b"), (8, 64, 512)
GIB, GPU = 2**30, 80 * 10**9
RESERVE = 10.5  # GiB, as the README says why
DEAREST = 1.05  # the cost of a pipeline's dearest stage over the mean
PARTS = ("weights", "gradients", "optimizer", "carry", "activations", "temporary")


@dataclass(frozen=True)
class Rank:
    """The first tensor rank of a stage."""

    parameters: int
    memory: RankMemory


def world(run: str) -> int:
    """The number of GPUs in a file's name."""
    return int(run.partition("_")[2].removesuffix("gpus"))


@cache
def load(run: str) -> RunConfig:
    return load_run_config(RUNS[run])


@cache
def stages_of(run: str) -> tuple[dict[str, torch.Size], ...]:
    """The shape of every parameter by name, in each stage, cut as in training; nothing has memory."""
    config = load(run)
    shapes = []
    with fake_tensor_ranks(config.parallel.tensor) as processes, warnings.catch_warnings():
        # Megatron-core, of a variable of the environment that is set before CUDA starts.
        warnings.simplefilter("ignore")
        for numbers in divide_layers(config.model, config.parallel.pipeline):
            with NoMemory(), torch.device("meta"):
                stage = Stage(config.model, numbers)
                if processes.tensor.size > 1:
                    cut_by_heads(stage, processes, config.parallel.sequence)
            shapes.append({name: parameter.shape for name, parameter in stage.named_parameters()})
    return tuple(shapes)


@cache
def ranks_of(run: str) -> tuple[Rank, ...]:
    config = load(run)
    data_ranks = config.parallel.data_ranks(world(run))
    lanes = config.data.lanes // (data_ranks * config.parallel.lane_groups)
    ranks = []
    for number, shapes in enumerate(stages_of(run)):
        parameters = sum(shape.numel() for shape in shapes.values())
        memory = memory_of_rank(
            config.model, config.parallel, config.data.segment, lanes, data_ranks, number, parameters
        )
        ranks.append(Rank(parameters, memory))
    return tuple(ranks)


def worst(run: str) -> RankMemory:
    return max((rank.memory for rank in ranks_of(run)), key=lambda memory: memory.total)


def parameters(run: str) -> int:
    return sum(shape.numel() for shape in whole_shapes(load(run).model).values())


def tokens_per_step(run: str) -> int:
    config = load(run)
    return config.data.lanes * config.parallel.segments_per_step * config.data.segment


def test_there_is_a_run_for_every_size_and_number_of_gpus() -> None:
    assert set(RUNS) == {f"{size}_{gpus}gpus" for size in SIZES for gpus in WORLDS}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_fits_the_number_of_gpus_in_its_name(run: str) -> None:
    config = load(run)
    config.check_world(world(run))
    assert config.parallel.tensor <= 8, "tensor ranks stay within a node"
    assert config.optimizer.ignored() == []
    assert config.run.dir == f"runs/scale/{run}"


@pytest.mark.parametrize("run", RUNS)
def test_all_ranks_of_all_stages_hold_the_whole_model(run: str) -> None:
    config = load(run)
    table, whole, ranks = cuts(config.model), whole_shapes(config.model), config.parallel.tensor
    seen: dict[str, int] = {}
    for shapes in stages_of(run):
        for name, shape in shapes.items():
            cut = cut_of(name, table)
            assert shape == share_shape(whole[name], cut, ranks), name
            # A tied embedding stands on two stages.
            seen[name] = shape.numel() * (1 if cut is None else ranks)
    assert seen == {name: shape.numel() for name, shape in whole.items()}
    assert sum(seen.values()) == parameters(run)


@pytest.mark.parametrize("run", RUNS)
def test_no_stage_is_much_dearer_than_the_others(run: str) -> None:
    config = load(run)
    costs = [
        sum(layer_flops(config.model, index) for index in numbers)
        for numbers in divide_layers(config.model, config.parallel.pipeline)
    ]
    costs[-1] += head_flops(config.model)
    assert max(costs) / (sum(costs) / len(costs)) < DEAREST


@pytest.mark.parametrize("run", RUNS)
def test_every_rank_stays_within_the_budget(run: str) -> None:
    assert max(rank.memory.total for rank in ranks_of(run)) / GIB <= GPU / GIB - RESERVE


def test_runs_of_one_size_are_the_same_model_and_see_as_many_tokens() -> None:
    for size in SIZES:
        runs = [f"{size}_{gpus}gpus" for gpus in WORLDS]
        assert len({load(run).model for run in runs}) == 1
        # To 1 %: the steps are round numbers.
        seen = [load(run).train.steps * tokens_per_step(run) for run in runs]
        assert max(seen) < 1.01 * min(seen)
        assert 19 * parameters(runs[0]) < seen[0] < 21 * parameters(runs[0])


def test_the_first_line_of_a_size_counts_its_parameters() -> None:
    for size in SIZES:
        run = f"{size}_8gpus"
        without = parameters(run) - whole_shapes(load(run).model)["embedding.weight"].numel()
        text = (SCALE / "parts" / f"size_{size}.yaml").read_text(encoding="utf-8")
        line = f"# {parameters(run) / 1e6:.1f} M parameters, {without / 1e6:.1f} M without the embedding: "
        assert text.startswith(line), line


# --- the README's table ---


def rows(first: str) -> dict[str, list[str]]:
    """The cells of the README's table whose first header is `first`, by the first cell of a row without its ticks."""
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    table = re.search(rf"^\| {first} \|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None, first
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()]
    return {row[0].strip("`").removesuffix(".yaml"): row[1:] for row in cells}


def test_the_readme_tells_every_layout() -> None:
    told = rows("run")
    assert set(told) == set(RUNS)
    for run, cells in told.items():
        config = load(run)
        parallel = config.parallel
        layout = f"{parallel.tensor} x {parallel.pipeline} x {parallel.data_ranks(world(run))}"
        lanes = f"{config.data.lanes} x {parallel.segments_per_step}"
        largest = max(rank.parameters for rank in ranks_of(run))
        assert cells == [
            f"{parameters(run):,}",
            layout,
            lanes,
            f"{tokens_per_step(run) / 1e6:.1f} M",
            f"{largest / 1e6:.1f} M",
        ], run


def test_the_readme_tells_the_memory_of_the_worst_rank() -> None:
    told = rows("GiB on the worst rank")
    assert set(told) == set(RUNS)
    for run, cells in told.items():
        memory = worst(run)
        parts = [f"{getattr(memory, part) / GIB:.1f}" for part in PARTS]
        assert cells == [*parts, f"{memory.total / GIB:.1f}"], run
        # So that the columns are all that the last one adds up.
        assert memory.step <= memory.activations + memory.temporary


def test_the_readme_tells_the_budget_and_its_reserve() -> None:
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert f"budget is {GPU / GIB - RESERVE:.1f} GiB: 80 GB, that is {GPU / GIB:.1f} GiB, less {RESERVE} GiB" in text
