"""Checkpoint folders: whole or not there, found without a pointer file, readable without running code.

    checkpoints/step-00000006/
      parameters.safetensors        every parameter by name, float32
      optimizer.safetensors         <parameter>/<moment>, float32
      carry-00000-00004.safetensors the carry of lanes 0 to 3, by layer; one file for each group that wrote it
      checkpoint.json               step, position and what else is needed to go on; size and hash of every file

Each stage of a pipeline writes files of its own, `parameters-layers-006-012.safetensors` and so on. How tensors are
spread over files is all that depends on the processes that wrote them; readers see the names alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FACTS = "checkpoint.json"
PARAMETERS = "parameters.safetensors"
OPTIMIZER = "optimizer.safetensors"
_NAME = re.compile(r"step-(\d{8})")
# What has another name today in recurrent layers of the first version, which knew one gate and one cell.
_RENAMED = {
    ".cell.gate.bias_D": ".cell.update.gate.bias_D",
    ".cell.update.weight": ".cell.update.gate.candidate.weight",
}
_CARRY = re.compile(r"carry-(\d+)-(\d+)(?:-layers-\d+-\d+)?\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and says why."""


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return run / "checkpoints" / f"step-{step:08d}"


def begin(run: Path, step: int) -> Path:
    """An empty folder in which the parts of a new checkpoint are written; `finish` gives it its name."""
    for left_behind in (run / "checkpoints").glob("*.partial"):
        shutil.rmtree(left_behind, ignore_errors=True)
    partial = folder_of(run, step).with_suffix(".partial")
    partial.mkdir(parents=True)
    return partial


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file and force it to the disk; CheckpointError where that fails, on a full disk say."""
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
        _sync(folder / name)
    except (OSError, SafetensorError) as error:
        (folder / name).unlink(missing_ok=True)
        raise CheckpointError(f"{folder / name} cannot be written: {error}") from error


def part_file(kind: str, layers: range | None = None) -> str:
    """The file of `kind`, PARAMETERS or OPTIMIZER; layers: those of the stage that writes it, None for all of them."""
    return f"{Path(kind).stem}{_of(layers)}.safetensors"


def carry_file(lanes: range, layers: range | None = None) -> str:
    """The file that holds the carry of `lanes`, global numbers; layers: as for `part_file`."""
    return f"carry-{lanes.start:05d}-{lanes.stop:05d}{_of(layers)}.safetensors"


def _of(layers: range | None) -> str:
    return "" if layers is None else f"-layers-{layers.start:03d}-{layers.stop:03d}"


def finish(partial: Path, facts: Mapping[str, Any]) -> Path:
    """Add the facts and the hashes of all parts, and give the folder its name. A checkpoint exists from here on."""
    files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
    told = {**facts, "files": files}
    (partial / FACTS).write_text(json.dumps({**told, "hash": _hash_of(told)}, indent=1) + "\n", encoding="utf-8")
    _sync(partial / FACTS)
    _sync(partial)
    final = partial.with_suffix("")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _sync(final.parent)
    return final


def newest_checkpoint(run: Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest undamaged checkpoint of a run, None where there is none. Damaged ones are told to `warn`.

    CheckpointError where there are checkpoints but none can be used: whoever started afresh would overwrite them.
    """
    folders = sorted(p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name))
    passed_over: list[str] = []
    for folder in reversed(folders):
        found = damage(folder)
        if found is None:
            if warn is not None:
                for line in passed_over:
                    warn(line)
            return folder
        passed_over.append(f"{folder.name} is passed over: {found}")
    if folders:
        raise CheckpointError(
            f"none of the {len(folders)} checkpoints of {run} can be used ({passed_over[0]}); "
            "mend them, or remove them to start again"
        )
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in one phrase; None if all files are there, with their sizes and hashes."""
    try:
        facts = read_facts(folder)
    except CheckpointError as error:
        return f"{error}"
    for name, expected in facts["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{path} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _describe(path) != expected:
            return f"{path} was altered: its hash is not the one in {FACTS}"
    return None


def read_facts(folder: Path) -> dict[str, Any]:
    """What `finish` was given, and the list of files. CheckpointError where it cannot be read or was altered."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {FACTS} cannot be read ({error})") from error
    expected = facts.pop("hash", None) if isinstance(facts, dict) else None
    if expected is None or expected != _hash_of(facts):
        raise CheckpointError(f"{folder / FACTS} was altered: its content is not what its own hash tells")
    return facts


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name; each is read when it is asked for."""

    def __init__(self, folder: Path, kind: str):
        """The files of `kind`, PARAMETERS or OPTIMIZER. CheckpointError where one cannot be read, or none is there."""
        self._places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, torch.Size] = {}
        for path in sorted(folder.glob(f"{Path(kind).stem}*.safetensors")) or [folder / kind]:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                        self._places[_name_today(name)] = path, name
                        self.shapes[_name_today(name)] = torch.Size(file.get_slice(name).get_shape())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def load_parameters(folder: Path) -> dict[str, Tensor]:
    """Every parameter by name, float32, whichever processes wrote them."""
    return dict(TensorFiles(folder, PARAMETERS))


def load_optimizer(folder: Path) -> dict[str, Tensor]:
    """The optimizer's moments by `<parameter>/<moment>`, float32."""
    return dict(TensorFiles(folder, OPTIMIZER))


def mismatch(held: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> str | None:
    """How the tensors of a checkpoint, by their shapes, are not the wanted ones, in one phrase that begins with a verb;
    None if they are.

    They are if none lacks, none is more than was wanted, and all have the wanted shapes.
    """
    lacking, surplus = [name for name in wanted if name not in held], [name for name in held if name not in wanted]
    told = [f"{verb} {_list(names)}" for verb, names in (("lacks", lacking), ("has besides", surplus)) if names]
    if told:
        return " and ".join(told)
    for name, shape in wanted.items():
        if held[name] != shape:
            return f"has {name} of shape {tuple(held[name])} instead of {tuple(shape)}"
    return None


def load_carry(folder: Path, lanes: range, layers: range | None = None) -> dict[str, Tensor]:
    """The carry of `lanes`, by the names of `Carry.tensors`, whoever wrote it. CheckpointError names a lacking lane.

    layers: only theirs.
    """
    rows: dict[str, list[Tensor]] = {}
    reached: dict[str, int] = {}
    for path, held in sorted(_carry_files(folder), key=lambda item: item[1].start):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                if layers is not None and int(name.split(".")[1]) not in layers:
                    continue
                next_lane = reached.setdefault(name, lanes.start)
                wanted = range(max(held.start, next_lane), min(held.stop, lanes.stop))
                if wanted and wanted.start == next_lane:
                    part = file.get_slice(name)[wanted.start - held.start : wanted.stop - held.start]
                    rows.setdefault(name, []).append(part)
                    reached[name] = wanted.stop
    lacking = min(reached.values(), default=lanes.start)
    if lacking != lanes.stop:
        raise CheckpointError(f"{folder} holds no carry of lane {lacking}")
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _carry_files(folder: Path) -> list[tuple[Path, range]]:
    matches = [(path, _CARRY.fullmatch(path.name)) for path in folder.iterdir()]
    return [(path, range(int(match[1]), int(match[2]))) for path, match in matches if match]


def _name_today(name: str) -> str:
    """The name of a parameter, or `<parameter>/<moment>`, whatever the version that wrote it."""
    parameter, slash, moment = name.partition("/")
    for old, new in _RENAMED.items():
        if parameter.endswith(old):
            parameter = parameter.removesuffix(old) + new
    return parameter + slash + moment


def _list(names: Sequence[str]) -> str:
    others = len(names) - 1
    return names[0] + (f" ({others} more tensor{'s' if others > 1 else ''})" if others else "")


def _hash_of(facts: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return {"size": path.stat().st_size, "hash": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
