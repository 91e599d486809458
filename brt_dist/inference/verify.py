"""Comparison with the reference implementation through its recorded vectors.

A vectors file holds three consecutive segments of some lanes: tokens, logits, losses, states, caches, and the gradients
of the first two. Our model takes the file's parameters and must reproduce all of it.

Dimension key
  B  lanes    L  tokens in a segment    C  blocks in a segment    W  window    S  states    D  width    H, K  heads
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brt_dist.data.errors import BadInput
from brt_dist.inference.reference_vectors import gradients_of, load_model, read_numbers, read_vectors
from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.recurrent_layer import RecurrentCell, RecurrentLayer
from brt_dist.model.transformer import BlockRecurrentTransformer

TOLERANCE = 1e-4
SEGMENTS = (1, 2, 3)
SEGMENTS_WITH_GRADIENTS = (1, 2)


@dataclass
class Errors:
    """Largest error of each quantity so far; what is not finite counts as the largest float, which JSON can hold."""

    logits: float = 0.0
    token_losses: float = 0.0
    states: float = 0.0
    caches: float = 0.0
    gradients: float = 0.0

    def note(
        self, quantity: str, ours: Tensor, vectors: Mapping[str, np.ndarray], key: str, relative: bool = False
    ) -> None:
        """Take in the largest difference to the file's array; relative to the array's largest entry unless that is 0.

        ValueError where it holds something else than floating-point numbers, or where the shapes differ: one must not
        be spread over the other.
        """
        reference = read_numbers(vectors, key)
        if ours.shape != reference.shape:
            raise ValueError(
                f"{key} has the shape {tuple(reference.shape)}, but {tuple(ours.shape)} in the model of config_json"
            )
        difference = float((ours.detach() - reference).abs().max())
        largest = float(reference.abs().max())
        error = difference / largest if relative and largest > 0 else difference
        setattr(self, quantity, max(getattr(self, quantity), error if math.isfinite(error) else sys.float_info.max))


def verify(path: Path) -> dict[str, Any]:
    """Run our model on a vectors file: the largest error of each quantity, and whether all are within 1e-4.

    Gradients are compared relative to each tensor's largest entry, absolutely where that is zero.
    BadInput where the file is no vectors file, or of a model that isn't one of ours.
    """
    vectors = read_vectors(path)
    try:
        errors = compare(load_model(vectors), vectors)
    except KeyError as missing:
        raise BadInput(f"{path} is not a complete vectors file: it lacks {missing.args[0]}") from missing
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        reason, _, _ = str(error).partition("\n")  # what follows in torch's own messages is a trace
        raise BadInput(f"{path} cannot be compared: {reason}") from error
    figures = vars(errors)
    return {"file": str(path), **figures, "passed": all(error <= TOLERANCE for error in figures.values())}


def compare(model: BlockRecurrentTransformer, vectors: Mapping[str, np.ndarray]) -> Errors:
    """Read the segments one after the other, our carry handed on, and note every quantity's error."""
    errors = Errors()
    _check_inputs(model.config, vectors)
    carry = Carry.fresh(model.config, vectors["tokens"].shape[1], torch.device("cpu"), torch.float32)
    for segment in SEGMENTS:
        states = _StateRecorder(model)
        tokens_BL, targets_BL, starts_BC = _inputs(model, vectors, segment)
        nats, nats_BL, next_carry = model.loss(tokens_BL, targets_BL, carry, starts_BC)
        for layer, states_BCSD in states.recorded().items():
            errors.note("states", states_BCSD, vectors, f"seg{segment}/state_after_block/{layer}")
        errors.note("token_losses", nats_BL, vectors, f"seg{segment}/token_losses")
        with torch.no_grad():
            errors.note("logits", model(tokens_BL, carry, starts_BC)[0], vectors, f"seg{segment}/logits")
        if segment in SEGMENTS_WITH_GRADIENTS:
            model.zero_grad()
            nats.backward()
            for name, gradient in gradients_of(model).items():
                errors.note("gradients", gradient, vectors, f"seg{segment}/grad/{name}", relative=True)
        carry = next_carry
        _compare_carry(errors, carry, vectors, segment)
    return errors


def _check_inputs(config: ModelConfig, vectors: Mapping[str, np.ndarray]) -> None:
    """ValueError unless tokens, starts, targets and masks have the kinds, shapes and values that belong together."""
    shape = vectors["tokens"].shape
    if len(shape) != 3 or shape[0] != len(SEGMENTS) or shape[1] == 0:
        raise ValueError(
            f"tokens has the shape {shape}; it must be ({len(SEGMENTS)}, lanes, tokens in a segment), lanes at least 1"
        )
    if shape[2] == 0 or shape[2] % config.window:
        raise ValueError(f"a segment of {shape[2]} tokens is not a positive multiple of the window, {config.window}")
    _check_array(vectors, "tokens", "whole numbers", shape)
    _check_array(vectors, "start_of_sequence", "true or false", shape[:2])
    for segment in SEGMENTS:
        _check_array(vectors, f"seg{segment}/targets", "whole numbers", shape[1:])
        _check_array(vectors, f"seg{segment}/loss_mask", "true or false", shape[1:])
    for segment, tokens_BL in zip(SEGMENTS, vectors["tokens"], strict=True):
        _check_ids("tokens", segment, tokens_BL, np.ones_like(tokens_BL, dtype=bool), config.vocab_size)
        targets_BL, predicted_BL = vectors[f"seg{segment}/targets"], vectors[f"seg{segment}/loss_mask"]
        _check_ids("targets", segment, targets_BL, predicted_BL, config.vocab_size)


def _check_array(vectors: Mapping[str, np.ndarray], key: str, kind: str, shape: tuple[int, ...]) -> None:
    array = vectors[key]
    if array.shape != shape or array.dtype.kind not in {"whole numbers": "iu", "true or false": "b"}[kind]:
        raise ValueError(f"{key} holds {array.dtype} of shape {array.shape}; it must be {kind} of shape {shape}")


def _check_ids(what: str, segment: int, ids_BL: np.ndarray, counted_BL: np.ndarray, vocab_size: int) -> None:
    """ValueError where an id that counts is none of the vocabulary's."""
    wrong = np.argwhere(counted_BL & ((ids_BL < 0) | (ids_BL >= vocab_size)))
    if len(wrong):
        lane, position = wrong[0]
        raise ValueError(
            f"{what} of segment {segment} hold {ids_BL[lane, position]} in lane {lane} at position {position}; "
            f"the vocabulary has the ids 0 to {vocab_size - 1}"
        )


def _inputs(
    model: BlockRecurrentTransformer, vectors: Mapping[str, np.ndarray], segment: int
) -> tuple[Tensor, Tensor, Tensor]:
    # Of any width and byte order, which torch does not take as they are.
    tokens_BL = torch.from_numpy(vectors["tokens"][segment - 1].astype(np.int64))
    targets_BL = torch.from_numpy(vectors[f"seg{segment}/targets"].astype(np.int64))
    predicted_BL = torch.from_numpy(vectors[f"seg{segment}/loss_mask"])
    starts_BC = torch.zeros(tokens_BL.shape[0], tokens_BL.shape[1] // model.config.window, dtype=torch.bool)
    starts_BC[:, 0] = torch.from_numpy(vectors["start_of_sequence"][segment - 1])
    return tokens_BL, targets_BL.masked_fill(~predicted_BL, -100), starts_BC


def _compare_carry(errors: Errors, carry: Carry, vectors: Mapping[str, np.ndarray], segment: int) -> None:
    for index, layer in enumerate(carry.layers):
        prefix = f"seg{segment}/carry_out/transformer{index}"
        errors.note("caches", layer.keys_BWHK, vectors, f"{prefix}/previous_keys")
        errors.note("caches", layer.values_BWHK, vectors, f"{prefix}/previous_values")
        if layer.state_BSD is not None:
            errors.note("states", layer.state_BSD, vectors, f"{prefix}/recurrent_state")


@dataclass
class _StateRecorder:
    """Listens to every recurrent cell during one forward pass."""

    model: BlockRecurrentTransformer
    states: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.handles = [
            self._listen(index, layer.cell)
            for index, layer in enumerate(self.model.layers)
            if isinstance(layer, RecurrentLayer)
        ]

    def _listen(self, index: int, cell: RecurrentCell) -> Any:
        self.states[index] = []
        return cell.register_forward_hook(lambda _cell, _inputs, state_BSD: self.states[index].append(state_BSD))

    def recorded(self) -> dict[int, Tensor]:
        """states_BCSD by layer; stops listening."""
        for handle in self.handles:
            handle.remove()
        return {index: torch.stack(states, dim=1) for index, states in self.states.items()}
