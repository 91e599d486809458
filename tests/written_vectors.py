"""Vectors files like those that were recorded of the reference, computed from its formulas written out.

Dimension key
  B  lanes    N  tokens in a segment    V  vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference_formulas import LiteralModel, SegmentOutcome
from reference_parameters import draw_parameters
from torch import Tensor

Arrays = dict[str, np.ndarray]
PADDING = 3


def write_vectors(path: Path, config: Mapping[str, Any], starts_IB: np.ndarray | None = None) -> None:
    """A complete vectors file of three segments, I.

    `config` holds all of the reference's keys, `batch_size` and `segment_length` too. starts_IB is as in recorded
    files unless given: every lane begins a document with segment 1, and the last one another with segment 3.
    """
    lanes, length, blocks = config["batch_size"], config["segment_length"], _blocks(config)
    drawn = draw_parameters(config)
    parameters = {name: torch.from_numpy(value).double().requires_grad_() for name, value in drawn.items()}
    model = LiteralModel(config, parameters)
    tokens_IBN = np.random.default_rng(1).integers(1, config["vocab_size"], (3, lanes, length), dtype=np.int32)
    tokens_IBN[1, -1, -PADDING:] = 0
    if starts_IB is None:
        starts_IB = np.zeros((3, lanes), dtype=bool)
        starts_IB[0], starts_IB[2, -1] = True, True

    arrays = {"config_json": np.array(json.dumps(config)), "tokens": tokens_IBN, "start_of_sequence": starts_IB}
    arrays |= {f"param/{name}": value for name, value in drawn.items()}
    memories = [model.zeros() for _ in range(lanes)]
    for segment, (tokens_BN, starts_B) in enumerate(zip(tokens_IBN, starts_IB, strict=True), 1):
        outcomes = [
            model.segment(tokens.tolist(), memory, [bool(start)] + [False] * (blocks - 1))
            for tokens, start, memory in zip(tokens_BN, starts_B, memories, strict=True)
        ]
        memories = [outcome.memory for outcome in outcomes]
        targets_BN = np.concatenate([tokens_BN[:, 1:], np.zeros((lanes, 1), np.int32)], axis=1)
        mask_BN = (tokens_BN != 0) & (targets_BN != 0)
        logits_BNV = torch.stack([outcome.logits_NV for outcome in outcomes])
        nats_BN = _nats(logits_BNV, torch.from_numpy(targets_BN).long()) * torch.from_numpy(mask_BN)
        found = {"logits": logits_BNV, "token_losses": nats_BN, "loss_sum": nats_BN.sum(), **_inside(outcomes)}
        if segment < 3:
            found |= _gradients(nats_BN.sum(), parameters)
        arrays |= {f"seg{segment}/targets": targets_BN, f"seg{segment}/loss_mask": mask_BN}
        arrays |= {f"seg{segment}/{name}": value.detach().float().numpy() for name, value in found.items()}
    np.savez(path, **arrays)


def _blocks(config: Mapping[str, Any]) -> int:
    return int(config["segment_length"] // config["window_length"])


def _nats(logits_BNV: Tensor, targets_BN: Tensor) -> Tensor:
    return -torch.log_softmax(logits_BNV, dim=-1).gather(-1, targets_BN[..., None]).squeeze(-1)


def _inside(outcomes: list[SegmentOutcome]) -> dict[str, Tensor]:
    """Outputs of layers, states and carries, lanes side by side."""
    found = {}
    for index in range(len(outcomes[0].memory)):
        carry = f"carry_out/transformer{index}"
        found[f"layer_out/{index}"] = torch.stack([outcome.layer_outs_LNd[index] for outcome in outcomes])
        found[f"{carry}/previous_keys"] = torch.stack([outcome.memory[index].keys for outcome in outcomes])
        found[f"{carry}/previous_values"] = torch.stack([outcome.memory[index].values for outcome in outcomes])
    for index in outcomes[0].states_CSd:
        states = torch.stack([outcome.states_CSd[index] for outcome in outcomes])
        found[f"state_after_block/{index}"] = states
        found[f"carry_out/transformer{index}/recurrent_state"] = states[:, -1]
    return found


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        f"grad/{name}": torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }
