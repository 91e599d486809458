"""The `brt` command: one thin function for each subcommand.

What a user can cause ends in one line on standard error and exit status 2; anything else is a bug and keeps its
traceback. Every part is imported by the subcommand that needs it, so that `brt --help` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from brt_dist.parallel.launcher import SECONDS_FOR_THE_LEADER_TO_SPEAK, read_launch

if TYPE_CHECKING:
    from brt_dist.run_config import RunConfig

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
bench = typer.Typer(rich_markup_mode=None, help="Measures layers, optimizer steps, shards and lanes; prints JSON.")
app.add_typer(bench, name="bench")
data = typer.Typer(rich_markup_mode=None, help="Checks, shows, imports and exports token shards.")
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

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Shards = Annotated[Path, typer.Argument(metavar="SHARDS", help="Folder of token shards.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to set otherwise, such as train.steps=200.")
]
# Launchers tell each process its number this way too; the environment tells the same.
LocalRank = Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)]


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
    run = _load(config, overrides)
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
    run = _load_on_all(config, overrides, "data.shards", "run.dir")
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
    run = _load(config, overrides)
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
    run = _load(config, overrides)
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
    run = _load(config, overrides)
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
    run = _load_on_all(config, overrides)
    from brt_dist.train.bench import bench_step

    sizes = run.data.segment, run.data.lanes
    result = bench_step(run.model, *sizes, run.parallel, run.optimizer, run.train, steps=steps, resolved=run.as_dict())
    if result is not None:
        print(json.dumps(result), flush=True)


@data.command()
def check(shards: Shards) -> None:
    """Checks every byte of a shard folder.

    Hashes of all files, ids inside the vocabulary, documents and tokens as the manifest counts them. Exit status 0 and
    one line of totals if all is well, else 2 and one line with the first range of bytes that is wrong.

    \b
    Example:
      brt data check shards/books
    """
    from brt_dist.data.check import check_shards

    print(check_shards(shards), flush=True)


@data.command()
def show(
    shards: Shards,
    document: Annotated[str | None, typer.Option(metavar="ID", help="Print this document.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Its token ids, one a line, in place of its text.")] = False,
) -> None:
    """Prints a document, or what the shards hold.

    The text goes to standard output exactly as it was, with nothing added; facts about it go to standard error.

    \b
    Examples:
      brt data show shards/books
      brt data show shards/books --document pg1342.txt > pg1342.txt
    """
    from brt_dist.data import show
    from brt_dist.data.token_shards import TokenShards

    opened = TokenShards.open(shards, verify="size")
    if document is None:
        print(show.table(opened), flush=True)
        return
    found = opened.split("all").only(document)
    print(show.facts(found), file=sys.stderr, flush=True)
    content = "".join(f"{token}\n" for token in found.tokens(0)) if tokens else show.text(opened, found)
    sys.stdout.buffer.write(content.encode())
    sys.stdout.buffer.flush()


@data.command("import")
def import_(
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX", help="Datasets: PREFIX.bin and PREFIX.idx.")],
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="New folder of token shards.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="M.model", help="sentencepiece model of the tokens.", show_default=False)
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", help="Without a model: how many ids there are.", show_default=False)
    ] = None,
    eos: Annotated[
        int | None, typer.Option(metavar="ID", help="Without a model: the id that ends documents.", show_default=False)
    ] = None,
    validation: Annotated[float, typer.Option(metavar="F", help="Share of the documents for validation.")] = 0.1,
    test: Annotated[float, typer.Option(metavar="F", help="Share of the documents for tests.")] = 0.1,
    split_at_eos: Annotated[
        bool, typer.Option("--split-at-eos", help="EOS inside a document begins another one.")
    ] = False,
) -> None:
    """Makes token shards of Megatron datasets.

    Datasets of Megatron-LM and GPT-NeoX are read with megatron-core. Each of several becomes a corpus of its own.
    Without a sentencepiece model the shards can be trained on, but their texts cannot be shown, and scores per byte and
    word are not known.

    \b
    Examples:
      brt data import megatron/books_text_document shards/books --tokenizer llama.model
      brt data import neox/code neox/books shards/mixed --vocab-size 50277 --eos 0 --validation 0.01 --test 0.01
    """
    from brt_dist.data.interchange import Vocabulary, import_datasets

    vocabulary = Vocabulary.of(tokenizer, vocab_size, eos)
    print(import_datasets(prefixes, shards, vocabulary, validation, test, split_at_eos), flush=True)


@data.command()
def export(
    shards: Shards,
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="PREFIX.bin and PREFIX.idx are written.")],
    split: Annotated[str, typer.Option(help="Which documents: train, validation, test or all.")] = "train",
    eos: Annotated[bool, typer.Option("--eos/--no-eos", help="EOS behind every document.")] = True,
) -> None:
    """Makes a Megatron dataset of token shards.

    Each document is one sequence. Ids and sources of documents have no place in that format.

    \b
    Example:
      brt data export shards/books megatron/books --split all
    """
    from brt_dist.data.interchange import export_shards

    print(export_shards(shards, prefix, split, end_with_eos=eos), flush=True)


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
        return _refuse(f"{error.format_message()} (see {where.command_path if where else 'brt'} --help)")
    except KeyboardInterrupt:
        return _refuse("interrupted", status=130)
    except BrokenPipeError:
        # Whoever read our output has left; without this, Python would complain once more while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = _user_line(error)
        if line is None:
            raise
        return _refuse(line, by_every_rank=not any(_is(error, *kind) for kind in SHARED_ERRORS))
    return 0


def _load(config: Path, overrides: Iterable[str] | None) -> RunConfig:
    from brt_dist.run_config import load_run_config

    return load_run_config(config, list(overrides or ()))


def _load_on_all(config: Path, overrides: Iterable[str] | None, *required: str) -> RunConfig:
    """The configuration, in all processes of a launch; where one of them refuses its own, none waits for it."""
    from brt_dist.run_config import ConfigError

    launch = read_launch()
    try:
        run = _load(config, overrides)
        run.require(*required)
        run.check_world(launch.world_size)
    except ConfigError as error:
        if launch.world_size > 1:
            # Where the others never come, torch would print the trace of its connection beside our line.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
            from brt_dist.parallel.process_groups import refuse_together

            if not refuse_together(launch, str(error)):
                raise typer.Exit(_refuse(str(error), by_every_rank=True)) from error
        raise
    return run


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


def _refuse(line: str, status: int = 2, by_every_rank: bool = False) -> int:
    """Prints `line` on standard error, once for all ranks unless it may concern this one alone; returns `status`."""
    rank = read_launch().rank
    if rank == 0 or by_every_rank:
        print(f"brt: {f'rank {rank}: ' if rank else ''}{' '.join(line.split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(SECONDS_FOR_THE_LEADER_TO_SPEAK)
    return status
