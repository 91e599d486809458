"""`brt evaluate`: scores whole documents with trained models; figures, JSON and a plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml

from brt_dist.checkpoint.files import PARAMETERS, TensorFiles, mismatch, newest_checkpoint
from brt_dist.data.atomic_file import whole_file, write_json
from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import SPLITS, Documents, TokenShards
from brt_dist.inference.documents import balanced_lanes, check_clear_every, score_documents
from brt_dist.inference.plot import plot_evaluation
from brt_dist.inference.report import ScoredRun, evaluation_report
from brt_dist.inference.scoring_progress import scoring_progress
from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer import BlockRecurrentTransformer

MOST_LANES = 16


@dataclass(frozen=True)
class FinishedRun:
    """A run folder, as far as scoring needs it."""

    folder: Path
    label: str
    model: ModelConfig
    shards: str
    verify: Literal["full", "size"]
    segment: int
    checkpoint: Path

    @property
    def step(self) -> int:
        """Optimizer steps behind the checkpoint; its folder is named step-00000006."""
        return int(self.checkpoint.name.rpartition("-")[2])


def evaluate(
    runs: Sequence[Path],
    split: str = "test",
    clear_carry_every: int | None = None,
    out: Path | None = None,
    lanes: int | None = None,
    segment: int | None = None,
) -> Path:
    """Scores every document of a split with the newest checkpoint of each run, all on the same shards.

    clear_carry_every: each run is scored a second time with its carry cleared every so many tokens. out: folder of
    the JSON and the PNG (default: in the first run's folder). lanes and segment change speed and
    memory, not the figures. Prints the figures and returns the path of the JSON.
    Raises BadInput before anything is scored, and then nothing is written.
    """
    finished = _load_runs([Path(run) for run in runs], segment)
    for run in finished:
        check_clear_every(clear_carry_every, run.model.window)
    shards = _common_shards(finished)
    documents = _documents(shards, split)
    lanes = balanced_lanes(documents.lengths, MOST_LANES) if lanes is None else lanes
    if lanes < 1:
        raise BadInput(f"{lanes} lanes cannot read {len(documents)} documents; at least 1 lane is needed")
    folder = _output_folder(out, finished)
    scored = [
        scored_way
        for run in finished
        for scored_way in _score(run, documents, shards.eos, lanes, _ways(clear_carry_every))
    ]
    report = evaluation_report(split, shards.hash, scored)
    path = _write(report, folder, clear_carry_every)
    print("\n".join([*_table(report), "", str(path), str(path.with_suffix(".png"))]), flush=True)
    return path


def load_run(folder: Path, label: str | None = None) -> FinishedRun:
    """Reads a run folder's configuration and finds its newest checkpoint; BadInput where one is missing."""
    if not folder.is_dir():
        raise BadInput(f"there is no run folder {folder}")
    path = folder / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        model: dict[str, Any] = dict(config["model"])
        data: dict[str, Any] = dict(config["data"])
        shards = data["shards"] or config["shards"]["dir"]
        segment, verify = int(data["segment"]), data.get("verify", "full")
    except FileNotFoundError:
        raise BadInput(f"{folder} is not a run folder: it has no config.yaml") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is not the configuration of a run: {type(error).__name__} {error}") from error
    try:
        model_config = ModelConfig(**model)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{path}: no model can be made of its section `model`: {error}") from error
    checkpoint = newest_checkpoint(folder, warn=lambda line: print(f"{folder}: {line}", file=sys.stderr))
    if checkpoint is None:
        raise BadInput(f"run {folder} has no finished checkpoint in {folder / 'checkpoints'}")
    return FinishedRun(folder, label or str(folder), model_config, shards, verify, segment, checkpoint)


def load_model(run: FinishedRun, device: torch.device) -> BlockRecurrentTransformer:
    """The run's model with the parameters of its checkpoint, ready to score; BadInput where they do not fit."""
    model = BlockRecurrentTransformer(run.model)
    parameters = TensorFiles(run.checkpoint, PARAMETERS)
    if found := mismatch(parameters.shapes, {name: tensor.shape for name, tensor in model.state_dict().items()}):
        raise BadInput(f"{run.checkpoint} does not fit the model of {run.folder / 'config.yaml'}: it {found}")
    model.load_state_dict(dict(parameters))
    return model.to(device).eval()


def _load_runs(folders: Sequence[Path], segment: int | None) -> list[FinishedRun]:
    """The runs with short labels, checked one by one; `segment`, if given, in place of their own."""
    if not folders:
        raise BadInput("no run folder was named; at least 1 is needed")
    names = [folder.resolve().name for folder in folders]
    resolved = [folder.resolve() for folder in folders]
    loaded = []
    for index, folder in enumerate(folders):
        if resolved[index] in resolved[:index]:
            raise BadInput(f"run {folder} was named twice")
        run = load_run(folder, label=names[index] if names.count(names[index]) == 1 else str(folder))
        size = run.segment if segment is None else segment
        if size < 1 or size % run.model.window:
            raise BadInput(
                f"a segment of {size} tokens is not a multiple of the window of {folder}, {run.model.window}"
            )
        loaded.append(replace(run, segment=size))
    return loaded


def _common_shards(runs: Sequence[FinishedRun]) -> TokenShards:
    """The shards that all runs were trained on; BadInput where they differ or do not fit a model."""
    opened: dict[str, TokenShards] = {}
    for run in runs:
        if run.shards not in opened:
            # The training of the run left this file: what it has checked need not be hashed again.
            memory = run.folder / "verified_shards.json"
            opened[run.shards] = TokenShards.open(run.shards, verify=run.verify, memory=memory)
        shards, first = opened[run.shards], opened[runs[0].shards]
        if shards.hash != first.hash:
            raise BadInput(
                f"{runs[0].folder} and {run.folder} read different shards and cannot be compared: "
                f"{runs[0].shards} has hash {first.hash}, {run.shards} has {shards.hash}"
            )
        if shards.vocab_size != run.model.vocab_size:
            raise BadInput(
                f"the model of {run.folder} has a vocabulary of {run.model.vocab_size}, "
                f"the shards in {run.shards} one of {shards.vocab_size}"
            )
    return opened[runs[0].shards]


def _documents(shards: TokenShards, split: str) -> Documents:
    documents = shards.split(split)
    if not len(documents):
        counts = ", ".join(f"{name} {len(shards.split(name))}" for name in SPLITS)
        raise BadInput(f"split {split} of the shards in {shards.folder} has no documents (documents: {counts})")
    return documents


def _ways(clear_carry_every: int | None) -> list[int | None]:
    return [None] if clear_carry_every is None else [None, clear_carry_every]


def _score(run: FinishedRun, documents: Documents, eos: int, lanes: int, ways: Sequence[int | None]) -> list[ScoredRun]:
    """The run scored once for each way of clearing its carry."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(run, device)
    scored = []
    for clear_every in ways:
        label = run.label if clear_every is None else f"{run.label}, carry cleared every {clear_every} tokens"
        with scoring_progress(label) as progress:
            nats = score_documents(
                model,
                documents,
                eos,
                lanes=lanes,
                segment=run.segment,
                clear_every=clear_every,
                device=device,
                progress=progress,
            )
        _check_finite(run, nats)
        sizes = (documents.bytes, documents.words)
        scored.append(ScoredRun(str(run.folder), label, run.step, clear_every, documents.ids, *sizes, nats))
    return scored


def _check_finite(run: FinishedRun, nats: Sequence[np.ndarray]) -> None:
    bad = sum(int(np.count_nonzero(~np.isfinite(document))) for document in nats)
    if bad:
        tokens = sum(len(document) for document in nats)
        raise BadInput(
            f"the model in {run.checkpoint} gives {bad} of {tokens} tokens a loss that is not a finite number"
        )


def _output_folder(out: Path | None, runs: Sequence[FinishedRun]) -> Path:
    """Made before anything is scored. By default in the first run's folder, with the others' names in its own."""
    others = "".join(f"-with-{run.folder.resolve().name}" for run in runs[1:])
    folder = runs[0].folder / f"evaluation{others}" if out is None else Path(out)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; the figures and the plot need a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(report: dict[str, Any], folder: Path, clear_carry_every: int | None) -> Path:
    """Writes JSON and PNG, each whole or not at all; returns the path of the JSON."""
    suffix = "" if clear_carry_every is None else f"-cleared-{clear_carry_every}"
    path = folder / f"{report['split']}{suffix}.json"
    with whole_file(path.with_suffix(".png")) as temporary:
        plot_evaluation(report, temporary)
    write_json(path, report)
    return path


def _table(report: dict[str, Any]) -> list[str]:
    """The figures in aligned lines, and the differences below them."""
    first = report["runs"][0]
    rows = [["run", "step", "bits/token", "bits/byte", "bits/word"]]
    for run in report["runs"]:
        values = [
            _with_error(run[f"bits_per_{unit}"], run[f"bits_per_{unit}_standard_error"])
            for unit in ("token", "byte", "word")
        ]
        rows.append([run["label"], str(run["step"]), *values])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    # Every document has text, but shards that were imported without a tokenizer cannot tell how much.
    size = f"{first['bytes']:,} bytes" if first["bytes"] else "bytes and words not known"
    lines = [
        f"{report['split']} split: {first['number_of_documents']:,} documents, {first['tokens']:,} tokens, "
        f"{size}; value ± one standard error over documents (other seeds are not in it)"
    ]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for pair in report["differences"]:
        value = _with_error(pair["bits_per_token"], pair["standard_error"], sign="+")
        lines.append(f"({pair['run']}) - ({pair['minus']}): {value} bits/token, paired by document")
    return lines


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
