"""Processes of one run must have been told the same: the same configuration, in the same version of the code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from brt_dist.parallel.launcher import LaunchError

# The one thing that a process tells whose own configuration cannot be run.
REFUSED = "refused"


def versions() -> dict[str, str]:
    """What else must be the same: the source, by a hash that tells working trees apart, and what it runs on."""
    folder = Path(__file__).resolve().parent.parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    packages = {f"the version of {name}": _version(name) for name in ("torch", "deepspeed", "megatron-core")}
    return {"the code (hash of brt_dist's source)": digest.hexdigest(), **packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def keys_and_versions(resolved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What every process of a run must have been told alike, by name: the configuration, and `versions`."""
    keys = {f"{section}.{key}": value for section, values in resolved.items() for key, value in values.items()}
    return keys | versions()


def check_agreement(told: Mapping[str, Any], rank: int, world_size: int, device: torch.device) -> None:
    """LaunchError in every process, which names the first two that differ, unless `told` is the same in all of them."""
    if world_size == 1:
        return
    text = json.dumps(told, sort_keys=True, default=str)
    digest = torch.frombuffer(bytearray(hashlib.blake2b(text.encode(), digest_size=16).digest()), dtype=torch.int64)
    mine = digest.to(device)
    every = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(every, mine)
    if all(torch.equal(each, every[0]) for each in every):
        return
    # Only now, since it is larger: what exactly each was told.
    stories: list[Any] = [None] * world_size
    dist.all_gather_object(stories, json.loads(text))
    raise LaunchError(disagreement(stories))


def disagreement(stories: Sequence[Mapping[str, Any]]) -> str:
    """In one line, how the first rank that was told something else than rank 0 differs from it."""
    refused = [rank for rank, story in enumerate(stories) if REFUSED in story]
    if refused:
        first = refused[0]
        other = next(rank for rank, story in enumerate(stories) if story != stories[first])
        return (
            f"the configuration of rank {first} is not that of rank {other} and is refused: {stories[first][REFUSED]}"
        )
    other = next(rank for rank, story in enumerate(stories) if story != stories[0])
    phrases = [
        f"{name} is {stories[0].get(name, 'missing')} in rank 0 and {stories[other].get(name, 'missing')} "
        f"in rank {other}"
        for name in dict.fromkeys([*stories[0], *stories[other]])
        if stories[0].get(name) != stories[other].get(name)
    ]
    count = sum(story != stories[0] for story in stories)
    others = f" ({count} ranks of {len(stories)} differ from rank 0)" if count > 1 else ""
    return f"the processes of this run were started differently: {'; '.join(phrases)}{others}"
