"""What a model is called with, checked before anything is computed: one clear line, not a failure deep inside.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment
"""

from __future__ import annotations

import torch
from torch import Tensor

from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.loss import IGNORED


def check_tokens(tokens_BL: Tensor, vocab_size: int, device: torch.device) -> None:
    """ValueError, with the place of the first, where a token is none of the vocabulary's."""
    _check_kind("tokens", tokens_BL, device)
    _check_ids("tokens", tokens_BL, vocab_size, (tokens_BL < 0) | (tokens_BL >= vocab_size))


def check_targets(targets_BL: Tensor, tokens_BL: Tensor, vocab_size: int) -> None:
    """ValueError unless there is one target for each token, one of the vocabulary or -100."""
    _check_kind("targets", targets_BL, tokens_BL.device)
    if targets_BL.shape != tokens_BL.shape:
        raise ValueError(f"targets have shape {tuple(targets_BL.shape)}, tokens {tuple(tokens_BL.shape)}")
    outside_BL = (targets_BL < 0) | (targets_BL >= vocab_size)
    _check_ids("targets", targets_BL, vocab_size, outside_BL & (targets_BL != IGNORED))


def _check_kind(what: str, ids_BL: Tensor, device: torch.device) -> None:
    if not isinstance(ids_BL, Tensor):
        raise ValueError(f"{what} are a {type(ids_BL).__name__}; expected a tensor, lanes x tokens")
    if ids_BL.dim() != 2 or ids_BL.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{what} have shape {tuple(ids_BL.shape)} and dtype {ids_BL.dtype}; expected int64 or int32, lanes x tokens"
        )
    if ids_BL.device != device:
        raise ValueError(f"{what} are on {ids_BL.device}, the model on {device}")


def _check_ids(what: str, ids_BL: Tensor, vocab_size: int, wrong_BL: Tensor) -> None:
    # On an accelerator this waits for the ids; one that slipped through would end the whole process there.
    if not ids_BL.is_meta and not torch.compiler.is_compiling() and bool(wrong_BL.any()):
        lane, position = wrong_BL.nonzero()[0].tolist()
        raise ValueError(
            f"{what} hold {int(ids_BL[lane, position])} in lane {lane} at position {position}; "
            f"the vocabulary has the ids 0 to {vocab_size - 1}"
        )


def check_starts(starts_BC: Tensor, lanes: int, blocks: int, device: torch.device) -> None:
    """ValueError unless there is one truth value for each lane and block."""
    if not isinstance(starts_BC, Tensor):
        raise ValueError(f"starts are a {type(starts_BC).__name__}; expected a tensor, lanes x blocks")
    if starts_BC.shape != (lanes, blocks) or starts_BC.dtype != torch.bool:
        raise ValueError(
            f"starts have shape {tuple(starts_BC.shape)} and dtype {starts_BC.dtype}; "
            f"expected ({lanes}, {blocks}) and torch.bool, for {lanes} lanes of {blocks} blocks"
        )
    if starts_BC.device != device:
        raise ValueError(f"starts are on {starts_BC.device}, the model on {device}")


def check_carry(
    carry: Carry, config: ModelConfig, lanes: int, device: torch.device, dtype: torch.dtype, heads: int
) -> None:
    """ValueError, naming tensor and numbers, unless `carry` is what this model returns for `lanes` lanes."""
    if not isinstance(carry, Carry):
        raise ValueError(f"the carry is a {type(carry).__name__}; expected the Carry that an earlier call returned")
    expected = Carry.fresh(config, lanes, torch.device("meta"), dtype, heads=heads).tensors()
    given = carry.tensors()
    if len(carry.layers) != config.num_layers or _states(given) != _states(expected):
        raise ValueError(
            f"the carry has {len(carry.layers)} layers with states in {_states(given)}; "
            f"the model has {config.num_layers} with states in {_states(expected)}"
        )
    for name, wanted in expected.items():
        tensor = given[name]
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"carry {name} has shape {tuple(tensor.shape)}; expected {tuple(wanted.shape)} for {lanes} lanes"
            )
        if tensor.dtype != wanted.dtype:
            raise ValueError(f"carry {name} has dtype {tensor.dtype}; expected {wanted.dtype}")
        if tensor.device != device:
            raise ValueError(f"carry {name} is on {tensor.device}, the model on {device}")


def _states(named: dict[str, Tensor]) -> list[int]:
    return [int(name.split(".")[1]) for name in named if name.endswith(".state")]
