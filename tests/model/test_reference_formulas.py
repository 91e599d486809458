"""The model against the reference's formulas written out literally, on shapes that no recorded vectors have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_formulas import LaneMemory, LiteralModel
from reference_parameters import draw_parameters, parameter_shapes
from torch import Tensor

from brt_dist.inference.reference_vectors import gradients_of, model_config, model_with_parameters
from brt_dist.model.carry import Carry

LIMIT = 1e-11
REFERENCE = Path(__file__).parents[1] / "reference"
RECORDED = ["baseline_slide", "baseline_xl", "fixed_skip", "lstm_dual", "feedback_fixed_skip"]

SKIP = {"recurrent_single_gate": False, "recurrent_skip_ffn": True}
DUAL = {"recurrent_single_gate": False, "recurrent_skip_ffn": False}
SINGLE = {"recurrent_single_gate": True, "recurrent_skip_ffn": False}
FIXED, LSTM = {"recurrent_gate_type": "bias"}, {"recurrent_gate_type": "lstm"}
FEEDBACK = {"feedback_recurrence": True, "dstack_window_length": 4}
SMALL: dict[str, Any] = {
    "num_layers": 4,
    "embedding_size": 5,
    "num_heads": 2,
    "head_size": 3,
    "mlp_dim": 7,
    "window_length": 4,
    "vocab_size": 13,
    "recurrent_layer_indices": [0, 2],
    "recurrent_num_states": 3,
    **FIXED,
    **SKIP,
    "feedback_recurrence": False,
    "dstack_window_length": 0,
}
# Distances beyond 128 fall into the last bucket, those from 16 on into logarithmic ones.
LONG_WINDOW = SMALL | {
    "num_layers": 2,
    "num_heads": 1,
    "mlp_dim": 4,
    "window_length": 160,
    "recurrent_layer_indices": [1],
    "recurrent_num_states": 2,
}
MORE_STATES_THAN_TOKENS = {"recurrent_num_states": 9}
NO_STATE = {"num_layers": 2, "recurrent_layer_indices": [], "recurrent_num_states": 0}


def layers(number: int, *recurrent: int) -> dict[str, Any]:
    return {"num_layers": number, "recurrent_layer_indices": list(recurrent)}


# Per segment, whether a document begins with each block. Every lane begins one with the very first.
TWO_SEGMENTS = [[True, False], [False, True]]
THREE_SEGMENTS = [[True, False, True], [False, False, True], [True, False, False]]
ONE_BLOCK_EACH = [[True], [False], [False]]

CASES = {
    "fixed skip": (SMALL, THREE_SEGMENTS),
    "fixed dual": (SMALL | DUAL, THREE_SEGMENTS),
    "fixed single": (SMALL | SINGLE, THREE_SEGMENTS),
    "lstm skip": (SMALL | LSTM, THREE_SEGMENTS),
    "lstm dual": (SMALL | LSTM | DUAL, THREE_SEGMENTS),
    "lstm single": (SMALL | LSTM | SINGLE, THREE_SEGMENTS),
    "fixed skip, feedback": (SMALL | FEEDBACK | layers(3, 1), THREE_SEGMENTS),
    "fixed skip, feedback, two recurrent layers": (SMALL | FEEDBACK, THREE_SEGMENTS),
    "lstm dual, feedback": (SMALL | LSTM | DUAL | FEEDBACK | layers(3, 1), THREE_SEGMENTS),
    "lstm dual, feedback, two recurrent layers": (SMALL | LSTM | DUAL | FEEDBACK, THREE_SEGMENTS),
    "lstm single, feedback": (SMALL | LSTM | SINGLE | FEEDBACK | layers(3, 1), THREE_SEGMENTS),
    "lstm single, feedback, two recurrent layers": (SMALL | LSTM | SINGLE | FEEDBACK, THREE_SEGMENTS),
    "feedback from the first layer": (SMALL | DUAL | FEEDBACK | layers(2, 0), TWO_SEGMENTS),
    "feedback from the last layer": (SMALL | LSTM | FEEDBACK | layers(3, 2), TWO_SEGMENTS),
    "feedback from adjacent layers": (SMALL | SINGLE | FEEDBACK | layers(4, 1, 2), TWO_SEGMENTS),
    "feedback, layers named out of order": (SMALL | FEEDBACK | layers(4, 3, 0), TWO_SEGMENTS),
    "feedback that no layer reads": (SMALL | FEEDBACK | layers(2, 0, 1), TWO_SEGMENTS),
    "feedback, more states than tokens in a block": (
        SMALL | DUAL | FEEDBACK | MORE_STATES_THAN_TOKENS | layers(2, 1),
        TWO_SEGMENTS,
    ),
    "feedback, one block in a segment": (SMALL | LSTM | FEEDBACK | layers(3, 1), ONE_BLOCK_EACH),
    "feedback asked for, but no block-wise stack": (SMALL | layers(2, 0) | {"feedback_recurrence": True}, TWO_SEGMENTS),
    "block-wise stack without feedback": (SMALL | layers(2, 0) | {"dstack_window_length": 4}, TWO_SEGMENTS),
    "more states than tokens in a block": (SMALL | LSTM | MORE_STATES_THAN_TOKENS | layers(2, 1), TWO_SEGMENTS),
    "one block in a segment": (SMALL | SINGLE | layers(2, 1), ONE_BLOCK_EACH),
    "every layer recurrent": (SMALL | LSTM | DUAL | layers(3, 0, 1, 2), TWO_SEGMENTS),
    "no recurrence": (SMALL | NO_STATE, TWO_SEGMENTS),
    "window beyond all position buckets": (LONG_WINDOW, [[True, False]]),
}
# Rotary positions turn coordinates in pairs.
PAIRS = SMALL | {"head_size": 4}
CASES_BEYOND_THE_REFERENCE = {
    "rotary": (PAIRS | LSTM, THREE_SEGMENTS, {"position": "rotary"}),
    "rotary, no recurrence": (PAIRS | NO_STATE, THREE_SEGMENTS, {"position": "rotary"}),
    "rotary, one block in a segment": (PAIRS | layers(2, 1), ONE_BLOCK_EACH, {"position": "rotary"}),
    "rotary, feedback": (PAIRS | FEEDBACK | layers(3, 1), THREE_SEGMENTS, {"position": "rotary"}),
    "rotary, feedback, two recurrent layers": (PAIRS | SINGLE | FEEDBACK, THREE_SEGMENTS, {"position": "rotary"}),
    "no positions": (SMALL | DUAL, THREE_SEGMENTS, {"position": "none"}),
    "no positions, feedback": (SMALL | LSTM | FEEDBACK | layers(3, 1), THREE_SEGMENTS, {"position": "none"}),
    "logits by the vocabulary": (SMALL | layers(2, 1), TWO_SEGMENTS, {"logit_scale": "sqrt_vocab"}),
    "rotary, feedback, logits by the vocabulary": (
        PAIRS | LSTM | DUAL | FEEDBACK,
        THREE_SEGMENTS,
        {"position": "rotary", "logit_scale": "sqrt_vocab"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_model_equals_the_formulas_written_out_token_by_token(case: str) -> None:
    compare(*CASES[case], {})


@pytest.mark.parametrize("case", CASES_BEYOND_THE_REFERENCE)
def test_the_model_equals_the_formulas_with_what_it_has_beyond_the_reference(case: str) -> None:
    compare(*CASES_BEYOND_THE_REFERENCE[case])


def compare(config: dict[str, Any], starts: list[list[bool]], beyond: dict[str, Any]) -> None:
    """Logits, carry and gradients, segment by segment. beyond: `position` and `logit_scale`."""
    lanes, length = (2 if config["window_length"] < 100 else 1), len(starts[0]) * config["window_length"]
    drawn = draw_parameters(config, beyond.get("position", "t5"))
    vectors = {f"param/{name}": value for name, value in drawn.items()}
    model = model_with_parameters(replace(model_config(config), **beyond), vectors).double()
    literal = LiteralModel(
        config, {name: torch.from_numpy(value).double().requires_grad_() for name, value in drawn.items()}, **beyond
    )
    memories = [literal.zeros() for _ in range(lanes)]
    carry = Carry.fresh(model.config, lanes, torch.device("cpu"), torch.float64)
    generator = torch.Generator().manual_seed(0)
    for segment, row in enumerate(starts):
        tokens_BL = torch.randint(config["vocab_size"], (lanes, length), generator=generator)
        weights_BLV = torch.randn(lanes, length, config["vocab_size"], generator=generator, dtype=torch.float64)
        # Lanes differ: the second one's starts are the first one's, turned round.
        starts_of_lanes = [row, row[::-1]][:lanes]
        if segment == 0:
            starts_of_lanes = [[True, *lane[1:]] for lane in starts_of_lanes]

        logits_BLV, carry = model(tokens_BL, carry, torch.tensor(starts_of_lanes))
        outcomes = [
            literal.segment(tokens_BL[lane].tolist(), memories[lane], starts_of_lanes[lane]) for lane in range(lanes)
        ]
        memories = [outcome.memory for outcome in outcomes]
        expected_BLV = torch.stack([outcome.logits_NV for outcome in outcomes])

        near(logits_BLV, expected_BLV, "logits")
        compare_carry(carry, memories)
        compare_gradients(model, literal, (logits_BLV * weights_BLV).sum(), (expected_BLV * weights_BLV).sum())


def compare_carry(carry: Carry, memories: list[list[LaneMemory]]) -> None:
    for index, layer in enumerate(carry.layers):
        near(layer.keys_BWHK, torch.stack([memory[index].keys for memory in memories]), f"keys of layer {index}")
        near(layer.values_BWHK, torch.stack([memory[index].values for memory in memories]), f"values of layer {index}")
        states = [state for memory in memories if (state := memory[index].state) is not None]
        assert (layer.state_BSD is None) == (not states)
        if layer.state_BSD is not None:
            near(layer.state_BSD, torch.stack(states), f"state of layer {index}")


def compare_gradients(model: Any, literal: LiteralModel, ours: Tensor, theirs: Tensor) -> None:
    model.zero_grad()
    ours.backward()
    names = list(literal.parameters)
    expected = torch.autograd.grad(theirs, [literal.parameters[name] for name in names], allow_unused=True)
    found = gradients_of(model)
    assert set(found) == set(names)
    for name, gradient in zip(names, expected, strict=True):
        near(found[name], torch.zeros_like(found[name]) if gradient is None else gradient, f"gradient of {name}")


def near(ours: Tensor, expected: Tensor, what: str) -> None:
    assert ours.shape == expected.shape, what
    difference = (ours.detach() - expected.detach()).abs().max().item()
    assert difference <= LIMIT * (1 + expected.detach().abs().max().item()), f"{what}: {difference:.1e} off"


@pytest.mark.parametrize("name", RECORDED)
def test_the_formulas_written_out_are_those_of_the_reference(name: str) -> None:
    """One lane, the one that begins a second document; what the reference computed, it computed in float32."""
    with np.load(REFERENCE / f"{name}.npz") as file:
        vectors = dict(file)
    config = json.loads(str(vectors["config_json"]))
    parameters = {
        key.removeprefix("param/"): torch.from_numpy(value).double()
        for key, value in vectors.items()
        if key.startswith("param/")
    }
    assert {key: tuple(value.shape) for key, value in parameters.items()} == parameter_shapes(config)
    literal, lane = LiteralModel(config, parameters), 1
    memory = literal.zeros()
    for segment in (1, 2, 3):
        start = bool(vectors["start_of_sequence"][segment - 1, lane])
        starts = [start] + [False] * (config["segment_length"] // config["window_length"] - 1)
        outcome = literal.segment(vectors["tokens"][segment - 1, lane].tolist(), memory, starts)
        memory = outcome.memory
        found = {"logits": outcome.logits_NV}
        found |= {f"layer_out/{index}": out for index, out in enumerate(outcome.layer_outs_LNd)}
        found |= {f"state_after_block/{index}": states for index, states in outcome.states_CSd.items()}
        for what, ours in found.items():
            assert np.abs(ours.numpy() - vectors[f"seg{segment}/{what}"][lane]).max() < 1e-5, what
