"""The `brt` command: one thin function for each subcommand.

What a user can cause ends in one line on standard error and exit status 2; anything else is a bug and keeps its
traceback. Every part is imported by the subcommand that needs it, so that `brt --help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from brt_dist.cli_arguments import Config, LocalRank, Overrides, load, load_on_all, refuse
from brt_dist.cli_bench import bench
from brt_dist.cli_data import data
from brt_dist.parallel.launcher import read_launch

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")

# Errors that a user causes and can mend, by the module that defines them.
USER_ERRORS = (
    ("brt_dist.run_config", "ConfigError"),
    ("brt_dist.data.errors", "BadInput"),
    ("brt_dist.checkpoint.files", "CheckpointError"),
    ("brt_dist.parallel.launcher", "LaunchError"),
)
# Those that every rank finds alike.
SHARED_ERRORS = (USER_ERRORS[0], USER_ERRORS[-1], ("preprocessing.ranks", "SharedBadInput"))


@app.callback()
def brt(local_rank: LocalRank = None) -> None:
    """Pretrains Block-Recurrent Transformers on long documents."""


@app.command()
def prepare(
    config: Config,
    overrides: Overrides = None,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Threads of each process.")] = 1,
    check_round_trip: Annotated[
        bool, typer.Option("--check-round-trip", help="Decode every document again and compare, not only some.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Draw the lengths of documents into the shard folder.")] = (
        False
    ),
) -> None:
    """Turns corpora into a tokenizer and token shards.

    Runs alone or in every process that mpiexec or srun starts; they share the work, and the result is the same to the
    byte. Started again after an interruption it goes on behind the last finished shard.

    \b
    Examples:
      brt prepare configs/quickstart/recurrent.yaml corpus.path=books shards.dir=shards/books
      mpiexec -n 8 brt prepare configs/quickstart/recurrent.yaml --check-round-trip --report
    """
    run = load(config, overrides)
    corpora = run.corpora_by_name()
    run.require("shards.dir")
    from preprocessing.prepare import prepare
    from preprocessing.ranks import opened_ranks

    with opened_ranks(read_launch().world_size) as ranks:
        settings = run.documents, run.tokenizer, run.splits, run.shards
        prepare(corpora, *settings, threads=threads, check_round_trip=check_round_trip, plot=report, ranks=ranks)


@app.command()
def train(config: Config, overrides: Overrides = None, local_rank: LocalRank = None) -> None:
    """Trains a model, or goes on with the run in its folder.

    Runs alone or in every process that torchrun, deepspeed, mpiexec or srun starts.

    \b
    Examples:
      brt train configs/quickstart/recurrent.yaml run.dir=runs/recurrent train.steps=200
      torchrun --nproc_per_node 2 -m brt_dist train configs/quickstart/recurrent.yaml
    """
    run = load_on_all(config, overrides, "data.shards", "run.dir")
    from brt_dist.train.trainer import train

    train(run.model, run.data, run.parallel, run.optimizer, run.train, run.run, resolved=run.as_dict())


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders; one curve for each.")],
    split: Annotated[str, typer.Option(help="Which documents: train, validation, test or all.")] = "test",
    clear_carry_every: Annotated[
        int | None, typer.Option(metavar="N", help="Also score with the carry cleared every N tokens.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the JSON and the plot.", show_default=False)
    ] = None,
    lanes: Annotated[int | None, typer.Option(metavar="N", help="Documents read side by side.")] = None,
    segment: Annotated[int | None, typer.Option(metavar="N", help="Tokens of one forward pass.")] = None,
) -> None:
    """Scores whole documents, with plots by position.

    Reports bits per token, byte and word, and the loss by document position, as JSON and a plot.

    \b
    Example:
      brt evaluate runs/recurrent runs/baseline --split test --clear-carry-every 512 --out evaluation
    """
    from brt_dist.inference.evaluate import evaluate

    evaluate(runs, split=split, clear_carry_every=clear_carry_every, out=out, lanes=lanes, segment=segment)


@app.command()
def verify(
    vectors: Annotated[list[Path], typer.Argument(metavar="VECTORS.npz", help="Files of reference vectors.")],
) -> None:
    """Checks the model against reference vectors.

    Prints the largest errors, one JSON line a file. Exit status 0 if all are within their limits, 1 if not.

    \b
    Example:
      brt verify tests/reference/fixed_skip.npz
    """
    from brt_dist.inference.verify import verify

    passed = True
    for path in vectors:
        result = verify(path)
        print(json.dumps(result), flush=True)
        passed = passed and bool(result["passed"])
    raise typer.Exit(0 if passed else 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `brt` with `arguments` (None: those of this process) and returns its exit status."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("brt", list(sys.argv[1:] if arguments is None else arguments)) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        where = getattr(error, "ctx", None)
        return refuse(f"{error.format_message()} (see {where.command_path if where else 'brt'} --help)")
    except KeyboardInterrupt:
        return refuse("interrupted", status=130)
    except BrokenPipeError:
        # Whoever read our output has left; without this, Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = _user_line(error)
        if line is None:
            raise
        return refuse(line, by_every_rank=not any(_is(error, *kind) for kind in SHARED_ERRORS))
    return 0


def _user_line(error: Exception) -> str | None:
    """What to tell the user about `error`, on one line; None for a bug."""
    if any(_is(error, module, kind) for module, kind in USER_ERRORS):
        return str(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
    return None


def _is(error: Exception, module: str, kind: str) -> bool:
    """Whether `error` is a `module.kind`; a module that nobody imported has raised nothing, so it stays unloaded."""
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], kind))
