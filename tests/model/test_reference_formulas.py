"""The model against the reference's formulas written out literally, on shapes that no recorded vectors have."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from reference_formulas import LaneMemory, LiteralModel
from torch import Tensor

from brt_dist.inference.reference_vectors import gradients_of, load_model, model_config, reference_names
from brt_dist.model.carry import Carry

LIMIT = 1e-11

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
    "recurrent_gate_type": "bias",
    "recurrent_single_gate": False,
    "recurrent_skip_ffn": True,
    "feedback_recurrence": False,
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
MORE_STATES_THAN_TOKENS = SMALL | {"num_layers": 2, "recurrent_layer_indices": [1], "recurrent_num_states": 9}
NO_STATE = SMALL | {"num_layers": 2, "recurrent_layer_indices": [], "recurrent_num_states": 0}

CASES = [
    pytest.param(
        SMALL, 3, [[True, False, True], [False, False, True], [True, False, False]], id="two recurrent layers"
    ),
    pytest.param(MORE_STATES_THAN_TOKENS, 2, [[False, True], [False, False]], id="more states than tokens in a block"),
    pytest.param(NO_STATE, 2, [[True, False], [False, True]], id="no recurrence"),
    pytest.param(LONG_WINDOW, 2, [[True, False]], id="window beyond all position buckets"),
]


def draw_parameters(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """A random value for every parameter by the reference's names, each of a size at which it matters."""
    d, inner = config["embedding_size"], config["num_heads"] * config["head_size"]
    states, mlp, heads = config["recurrent_num_states"], config["mlp_dim"], config["num_heads"]
    shapes = {
        "embed/embedding": (config["vocab_size"], d),
        "rel_embedding": (heads, 32),
        "attention_scale": (heads,),
        "attention_scale2": (heads,),
        "recurrent_initial_state": (states, d),
        "position_embeddings": (states, d),
        "gate_bias": (d,),
        "scale": (d,),
        "hidden0/kernel": (d, mlp),
        "ffn/output_layer/kernel": (mlp, d),
        **{f"{kind}_layer/kernel": (d, inner) for kind in ("keys", "values", "queries", "queries2")},
    }
    generator = np.random.default_rng(0)
    parameters = {}
    for name in (name for names in reference_names(model_config(config)).values() for name in names):
        if name.endswith("post_attn_mlp/output_layer/kernel"):
            both = "recurrent_tbase" in name or int(name[11]) in config["recurrent_layer_indices"]
            shape: tuple[int, ...] = ((2 if both else 1) * inner, d)
        else:
            shape = next(shape for ending, shape in shapes.items() if name.endswith(ending))
        values = generator.standard_normal(shape)
        if name.endswith("kernel"):
            values /= np.sqrt(shape[0])
        if name.endswith(("attention_scale", "attention_scale2")):
            values *= 2  # of both signs: the reference takes the absolute value
        parameters[name] = values.astype(np.float32)
    return parameters


@pytest.mark.parametrize(("config", "blocks", "starts"), CASES)
def test_the_model_equals_the_formulas_written_out_token_by_token(
    config: dict[str, Any], blocks: int, starts: list[list[bool]]
) -> None:
    lanes, length = (2 if config["window_length"] < 100 else 1), blocks * config["window_length"]
    drawn = draw_parameters(config)
    vectors = {f"param/{name}": value for name, value in drawn.items()} | {"config_json": np.array(json.dumps(config))}
    model = load_model(vectors).double()
    literal = LiteralModel(
        config, {name: torch.from_numpy(value).double().requires_grad_() for name, value in drawn.items()}
    )
    memories = [literal.fresh() for _ in range(lanes)]
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
        memories = [memory for _, memory in outcomes]
        expected_BLV = torch.stack([logits for logits, _ in outcomes])

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
