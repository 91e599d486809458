"""First values of the parameters, and construction without memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from no_memory import NoMemory
from small_models import CELLS, FAMILY, small_config, variant_name
from torch import Tensor, nn

from brt_dist.model.config import ModelConfig
from brt_dist.model.gates import FixedGate, LSTMGate
from brt_dist.model.initialization import initialize
from brt_dist.model.transformer import BlockRecurrentTransformer

WIDE: dict[str, Any] = {
    "vocab_size": 300,
    "dim": 96,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 16,
    "mlp_dim": 160,
    "window": 8,
    "num_states": 64,
    "recurrent_layers": (1,),
}
# Mean and standard deviation by name: dim 96, heads x head_dim 64, mlp_dim 160.
EXPECTED = {
    "embedding.weight": (0, 1),
    "final_norm.weight": (1, 0),
    "*attention_norm.weight": (1, 0),
    "*mlp_norm.weight": (1, 0),
    "*.cell.norm.weight": (1, 0),
    "*.scale_H": (1, 0),
    "*.state_scale_H": (1, 0),
    "*.token_scale_H": (1, 0),
    "*.bias.table": (0, 0),
    "*.projection.weight": (0, 96**-0.5),
    "*.mlp.input.weight": (0, 96**-0.5),
    "*.mlp.output.weight": (0, 160**-0.5),
    "layers.1.tokens.attention_output.weight": (0, 128**-0.5),
    "*.cell.ids_SD": (0, 1),
    "*.initial_state_SD": (0, 0.1),
}
# What the rows of each matrix of a cell's update go over.
INPUTS = {
    "skip": {"gate": 128},
    "dual": {"gate": 128, "mlp_input": 96, "mlp_gate": 160},
    "single": {"mlp_input": 128, "gate": 160},
}


def expected_of(gate: str, cell: str, feedback: bool) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation by the pattern of a name; `[part]` is one matrix of a stack."""
    expected: dict[str, tuple[float, float]] = dict(EXPECTED)
    expected["layers.0.attention_output.weight"] = (0, (128 if feedback else 64) ** -0.5)
    for name, inputs in INPUTS[cell].items():
        update = f"*.update.{name}"
        if name == "mlp_input":
            expected[f"{update}.weight"] = (0, inputs**-0.5)
        elif gate == "fixed":
            expected |= {f"{update}.candidate.weight": (0, inputs**-0.5), f"{update}.bias_D": (0, 0.1)}
        else:
            # Of the stack's three matrices the first is the candidate's, the others the gates'.
            stds = (inputs**-0.5, (0.1 / inputs) ** 0.5, (0.1 / inputs) ** 0.5)
            expected |= {f"{update}.candidate_and_gates.weight[[]{part}]": (0, std) for part, std in enumerate(stds)}
            expected |= {f"{update}.{kind}_bias_D": (0, 0.1) for kind in ("input", "forget")}
    return expected


def built(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(BlockRecurrentTransformer(config).state_dict())


def matrices(config: ModelConfig) -> dict[str, Tensor]:
    """Initial values, an LSTM gate's three matrices one by one."""
    found: dict[str, Tensor] = {}
    for name, values in built(config).items():
        if name.endswith("candidate_and_gates.weight"):
            found |= {f"{name}[{part}]": rows for part, rows in enumerate(values.chunk(3))}
        else:
            found[name] = values
    return found


@pytest.mark.parametrize("variant", FAMILY, ids=variant_name)
def test_every_parameter_has_the_mean_and_the_spread_of_the_table(variant: dict[str, Any]) -> None:
    expected, used = expected_of(**variant), set()
    for name, values in matrices(ModelConfig(**WIDE, **variant)).items():
        (pattern,) = [pattern for pattern in expected if fnmatch(name, pattern)]
        used.add(pattern)
        mean, std = expected[pattern]
        if std == 0:
            assert torch.equal(values, torch.full_like(values, mean)), name
            continue
        samples = values.numel()
        assert abs(values.mean().item() - mean) < 5 * std / math.sqrt(samples), name
        assert abs(values.std().item() / std - 1) < 5 / math.sqrt(2 * samples), name
        assert len(values.unique()) > 0.9 * samples, name
    assert used == set(expected)


@pytest.mark.parametrize("cell", INPUTS)
def test_gate_matrices_are_cut_off_at_two_standard_deviations_and_no_others_are(cell: str) -> None:
    """Of the normal before the cut, which makes it narrower: by 0.8796."""
    values = matrices(ModelConfig(**WIDE, gate="lstm", cell=cell))  # type: ignore[arg-type]
    for name, inputs in INPUTS[cell].items():
        if name == "mlp_input":
            continue
        candidate, *gates = (
            values[f"layers.1.cell.update.{name}.candidate_and_gates.weight[{part}]"] for part in range(3)
        )
        std = (0.1 / inputs) ** 0.5 / 0.87962566
        for gate in gates:
            assert 1.98 * std < gate.abs().max() <= 2.0001 * std
            # 68.27 % of a normal, of which 95.45 % are left; more than five standard deviations.
            assert abs((gate.abs() < std).float().mean().item() - 0.6827 / 0.9545) < 0.025
        assert candidate.abs().max() > 3 * inputs**-0.5


@pytest.mark.parametrize("cell", INPUTS)
def test_an_lstm_gate_begins_by_remembering(cell: str) -> None:
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(ModelConfig(**WIDE, gate="lstm", cell=cell))  # type: ignore[arg-type]
    opened = []

    def read_gate(gate: LSTMGate, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _, of_input, of_forget = (inputs[1] @ rows.T for rows in gate.candidate_and_gates.weight.chunk(3))
        admit = torch.sigmoid(of_input + gate.input_bias_D - 1)
        keep = torch.sigmoid(of_forget + gate.forget_bias_D + 1)
        opened.append((admit.mean().item(), keep.mean().item()))
        assert gate.openness(inputs[1]).item() == pytest.approx(opened[-1][0], abs=1e-6)

    for gate in model.modules():
        if isinstance(gate, LSTMGate):
            gate.register_forward_hook(read_gate)
    model(torch.randint(300, (2, 32)))
    assert len(opened) == (8 if cell == "dual" else 4)
    for admitted, kept in opened:
        assert admitted < 0.3
        assert kept > 0.7


def test_a_fixed_gate_begins_half_open() -> None:
    torch.manual_seed(0)
    model = BlockRecurrentTransformer(ModelConfig(**WIDE, cell="dual"))
    gates = [gate for gate in model.modules() if isinstance(gate, FixedGate)]
    assert len(gates) == 2
    for gate in gates:
        assert abs(gate.openness(torch.empty(0)).item() - 0.5) < 0.02
        assert gate.bias_D.std() > 0.05


@pytest.mark.parametrize("gate", ["fixed", "lstm"])
def test_no_two_parameters_start_from_the_same_draws(gate: Any) -> None:
    values = matrices(ModelConfig(**WIDE, gate=gate, cell="dual", feedback=True))
    drawn = [value for name, value in values.items() if value.dim() == 2 and value.any()]
    firsts = [value.flatten()[:8] / value.std() for value in drawn]
    for index, first in enumerate(firsts):
        assert not any(torch.allclose(first, other, atol=1e-3) for other in firsts[:index])


@pytest.mark.parametrize("variant", CELLS, ids=variant_name)
def test_a_parameter_starts_the_same_whatever_else_the_model_has(variant: dict[str, Any]) -> None:
    values = built(small_config(**variant))
    deeper = built(small_config(num_layers=5, **variant))
    bigger = built(small_config(vocab_size=40, num_states=7, window=8, position="rotary", feedback=True, **variant))
    assert set(values) < set(deeper)
    for name, value in values.items():
        assert torch.equal(value, deeper[name]), name
        if name in bigger and bigger[name].shape == value.shape:
            assert torch.equal(value, bigger[name]), name


def test_the_seed_of_torch_decides_and_is_used_up() -> None:
    first, again, other = built(small_config()), built(small_config()), built(small_config(), seed=1)
    torch.manual_seed(0)
    next_one = [BlockRecurrentTransformer(small_config()).state_dict() for _ in range(2)][1]
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        if value.std() > 0:
            assert not torch.isclose(value, other[name]).all(), name
            assert not torch.isclose(value, next_one[name]).all(), name


def test_a_parameter_that_the_table_does_not_know_is_named() -> None:
    model = BlockRecurrentTransformer(small_config())
    model.register_parameter("surprise", nn.Parameter(torch.zeros(2)))
    with pytest.raises(KeyError, match="surprise"):
        initialize(model, seed=0)


@pytest.fixture
def _no_memory() -> Iterator[None]:
    with NoMemory():
        yield


@pytest.mark.usefixtures("_no_memory")
def test_construction_on_the_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        model = BlockRecurrentTransformer(ModelConfig(dim=16384, mlp_dim=65536, num_layers=4, recurrent_layers=(1,)))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 8 * 10**9


@pytest.mark.usefixtures("_no_memory")
def test_a_model_on_the_meta_device_tells_the_shapes_of_a_step() -> None:
    with torch.device("meta"):
        model = BlockRecurrentTransformer(ModelConfig(num_layers=2, recurrent_layers=(1,)))
        tokens_BL = torch.zeros(4, 2048, dtype=torch.int64)
    logits, carry = model(tokens_BL)
    assert logits.shape == (4, 2048, 32128)
    assert all(tensor.is_meta for tensor in carry.tensors().values())


def test_the_memory_check_of_these_tests_can_fail() -> None:
    with pytest.raises(AssertionError), NoMemory():
        BlockRecurrentTransformer(small_config())
