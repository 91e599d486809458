"""What subcommands of `brt` have in common: their arguments, how a configuration is loaded, how a user is refused."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brt_dist.parallel.launcher import SECONDS_FOR_THE_LEADER_TO_SPEAK, read_launch

if TYPE_CHECKING:
    from brt_dist.run_config import RunConfig

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to set otherwise, such as train.steps=200.")
]
# Launchers tell each process its number this way too; the environment tells the same.
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]


def load(config: Path, overrides: Iterable[str] | None) -> RunConfig:
    """The configuration in a file, with overrides; ConfigError if it cannot be run."""
    from brt_dist.run_config import load_run_config

    return load_run_config(config, list(overrides or ()))


def load_on_all(config: Path, overrides: Iterable[str] | None, *required: str) -> RunConfig:
    """The configuration, in all processes of a launch; where one of them refuses its own, none waits for it."""
    from brt_dist.run_config import ConfigError

    launch = read_launch()
    try:
        run = load(config, overrides)
        run.require(*required)
        run.check_world(launch.world_size)
    except ConfigError as error:
        if launch.world_size > 1:
            # Where the others never come, torch would print the trace of its connection beside our line.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
            from brt_dist.parallel.process_groups import refuse_together

            if not refuse_together(launch, str(error)):
                raise typer.Exit(refuse(str(error), by_every_rank=True)) from error
        raise
    return run


def refuse(line: str, status: int = 2, by_every_rank: bool = False) -> int:
    """Prints `line` on standard error, once for all ranks unless it may concern this one alone; returns `status`."""
    rank = read_launch().rank
    if rank == 0 or by_every_rank:
        print(f"brt: {f'rank {rank}: ' if rank else ''}{' '.join(line.split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_THE_LEADER_TO_SPEAK)
    return status
