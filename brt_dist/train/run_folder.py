"""The folder of a run: its configuration, which is written once, and the lines it has logged.

A folder belongs to one configuration. What may differ when a run goes on: how often something is saved or scored, how
the work is laid over processes, and how long it is (the learning rate's cosine then ends elsewhere).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from brt_dist.data.atomic_file import whole_file, write_json
from brt_dist.data.config import DataConfig
from brt_dist.data.errors import BadInput
from brt_dist.model.config import ModelConfig
from brt_dist.train.config import OptimizerConfig, TrainConfig

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
STREAM = "stream.json"
VERIFIED = "verified_shards.json"

OWN_SECTIONS = {"model": ModelConfig, "data": DataConfig, "optimizer": OptimizerConfig, "train": TrainConfig}
FREE_KEYS = (
    *("data.shards", "data.verify"),  # the checkpoint knows the tokens themselves by their hash
    *(f"train.{key}" for key in ("steps", "save_every", "profile_steps")),
    *(f"train.{key}" for key in ("evaluate_every", "evaluate_documents", "evaluate_tokens", "health_every")),
)

Config = Mapping[str, Mapping[str, Any]]


def check_run_folder(folder: Path, resolved: Config) -> None:
    """BadInput where the folder holds a run of another configuration; names the keys and both values."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"run.dir {folder} is a file; a run needs a folder")
    path = folder / CONFIG
    if not path.exists():
        for traces in ("checkpoints", METRICS):
            if (folder / traces).exists():
                raise BadInput(f"{folder} holds {traces} of a run, but no {CONFIG}; choose another run.dir")
        return
    try:
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
        different = differences(there, resolved)
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as a configuration, so {folder} is left alone") from error
    if different:
        raise BadInput(f"{folder} holds a run of another configuration: {'; '.join(different)}; choose another run.dir")


def differences(there: Config, here: Config) -> list[str]:
    """A phrase for each key that decides a run's result and has another value.

    A key that `there` lacks, because it is newer than the run, had its default.
    """
    flat_there, flat_here = (_flat(_with_defaults(there)) | _reading(there), _flat(here) | _reading(here))
    return [
        f"{key} is {flat_there.get(key)} there and {flat_here.get(key)} here"
        for key in dict.fromkeys([*flat_there, *flat_here])
        if flat_there.get(key) != flat_here.get(key)
    ]


def _reading(config: Config) -> dict[str, Any]:
    """How much of its lanes a step reads: all that the layout decides of a result."""
    parallel = config.get("parallel", {})
    segments = parallel.get("micro_batches", 1) if parallel.get("micro_batch_axis") == "segments" else 1
    return {"the number of segments in a step (parallel.micro_batch_axis, parallel.micro_batches)": segments}


def _with_defaults(config: Config) -> Config:
    return {
        section: {name: _plain(value) for name, value in asdict(kind()).items()} | dict(config.get(section, {}).items())
        for section, kind in OWN_SECTIONS.items()
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _flat(config: Config) -> dict[str, Any]:
    flat = {f"{section}.{key}": value for section in OWN_SECTIONS for key, value in config.get(section, {}).items()}
    return {key: value for key, value in flat.items() if key not in FREE_KEYS}


def read_stream(folder: Path) -> dict[str, str] | None:
    """The hashes of the shards and of the lane plan that the folder's run reads; None where there is no run yet."""
    path = folder / STREAM
    if not path.exists():
        return None
    try:
        stream = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(stream[name]) for name in ("shards", "plan")}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} cannot be read, so {folder} is left alone: {error}") from error


def write_config(folder: Path, resolved: Config, stream: Mapping[str, str]) -> None:
    """Write which tokens the run reads and then the resolved configuration, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STREAM, dict(stream))
    _write(folder / CONFIG, yaml.safe_dump(dict(resolved), sort_keys=False))


def drop_lines_after(path: Path, step: int) -> None:
    """Keep the JSON lines of steps up to `step`; a last line that was cut off goes too."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        _write(path, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
