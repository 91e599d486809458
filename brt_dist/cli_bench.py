"""`brt bench`: the subcommands that measure."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from brt_dist.cli_arguments import Config, LocalRank, Overrides, load, load_on_all

bench = typer.Typer(rich_markup_mode=None, help="Measures layers, optimizer steps, shards and lanes; prints JSON.")


@bench.command()
def layers(
    config: Config,
    overrides: Overrides = None,
    lanes: Annotated[int, typer.Option(metavar="N", min=1, help="Lanes of the segment.")] = 1,
    repeat: Annotated[int, typer.Option(metavar="R", min=1, help="Rounds, behind a warm-up.")] = 7,
) -> None:
    """Times an ordinary and a recurrent layer, and their ratio.

    Forward and backward over one segment, in turn: CPU seconds of the process on the CPU, seconds of the device on a
    GPU. The ratio by floating-point operations, which stages of a pipeline are balanced by, stands beside it.

    \b
    Example:
      OMP_NUM_THREADS=1 brt bench layers configs/quickstart/recurrent.yaml --lanes 4 --repeat 9
    """
    run = load(config, overrides)
    from brt_dist.train.bench import bench_layers

    print(json.dumps(bench_layers(run.model, run.data.segment, lanes, repeat)), flush=True)


@bench.command("prepare")
def bench_prepare(
    config: Config,
    overrides: Overrides = None,
    megabytes: Annotated[float, typer.Option(metavar="N", min=0.001, help="About so much text, from all over.")] = 20.0,
) -> None:
    """Times the making of shards beside sentencepiece alone.

    Needs the finished shards, whose tokenizer it takes; they stay as they are. Megabytes of text a CPU second on one
    core, of the whole work and of sentencepiece's encoding of the same text.

    \b
    Example:
      OMP_NUM_THREADS=1 brt bench prepare configs/quickstart/recurrent.yaml --megabytes 30
    """
    run = load(config, overrides)
    run.require("shards.dir")
    from preprocessing.bench import bench_prepare

    result = bench_prepare(run.corpora_by_name(), run.documents, run.splits, run.shards, megabytes)
    print(json.dumps(result), flush=True)


@bench.command("lanes")
def bench_lanes(
    config: Config,
    overrides: Overrides = None,
    documents: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Synthetic documents in place of data.shards.")
    ] = None,
    lanes: Annotated[int | None, typer.Option(metavar="L", min=1, help="Lanes in place of data.lanes.")] = None,
) -> None:
    """Times the lane plan and the reading of batches.

    CPU seconds and memory to plan an epoch, milliseconds to find a position of it, the share of padding, and tokens
    read a second from memory. With data.weights, synthetic documents are evenly of the corpora named there.

    \b
    Examples:
      brt bench lanes configs/quickstart/recurrent.yaml
      brt bench lanes configs/quickstart/recurrent.yaml --documents 10000000 --lanes 1024
    """
    run = load(config, overrides)
    from brt_dist.train.lane_bench import bench_lanes

    print(json.dumps(bench_lanes(run.data, run.model.window, documents, lanes)), flush=True)


@bench.command()
def step(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps, behind a warm-up.")] = 10,
    local_rank: LocalRank = None,
) -> None:
    """Times optimizer steps of the whole configuration.

    Tokens are random, so no shards are needed. Runs alone or in every process that torchrun, deepspeed, mpiexec or
    srun starts; the leading one prints seconds, tokens per second and the memory of every rank.

    \b
    Examples:
      brt bench step configs/quickstart/recurrent.yaml --steps 5
      torchrun --nproc_per_node 2 -m brt_dist bench step configs/quickstart/recurrent.yaml parallel.pipeline=2
    """
    run = load_on_all(config, overrides)
    from brt_dist.train.bench import bench_step

    sizes = run.data.segment, run.data.lanes
    result = bench_step(run.model, *sizes, run.parallel, run.optimizer, run.train, steps=steps, resolved=run.as_dict())
    if result is not None:
        print(json.dumps(result), flush=True)
