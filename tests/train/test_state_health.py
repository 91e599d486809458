"""The health of the state: figures that can be worked out by hand, and an alarm where a state is dead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import WINDOW, small_model, some_tokens
from training_runs import STEPS, Runs

from brt_dist.model.gates import FixedGate, LSTMGate
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.train.state_health import Alarms, StateHealth

ALONE: Any = SimpleNamespace(sum_named=dict)


def figures_of(model: BlockRecurrentTransformer, segments: int = 1) -> dict[str, float]:
    with StateHealth(dict(enumerate(model.layers))).listening(True) as heard:
        for seed in range(segments):
            model(some_tokens(2, 3 * WINDOW, seed))
    return heard.means(ALONE)


def set_biases(model: BlockRecurrentTransformer, value: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and name.endswith("bias_D"):
                parameter.fill_(value)
            if "candidate_and_gates" in name:
                parameter.zero_()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"recurrent_layers": ()}, []),
        ({}, ["state_attention/1", "state_change/1", "gate_openness/1"]),
        ({"gate": "lstm", "cell": "single"}, ["state_attention/1", "state_change/1", "gate_openness/1"]),
        (
            {"cell": "dual", "feedback": True},
            [
                *("state_attention/0", "state_attention/1", "state_change/1", "gate_openness/1", "mlp_gate_openness/1"),
                "state_attention/2",
            ],
        ),
        (
            {"recurrent_layers": (0, 2)},
            [
                f"{figure}/{layer}"
                for layer in (0, 2)
                for figure in ("state_attention", "state_change", "gate_openness")
            ],
        ),
    ],
    ids=["no recurrence", "fixed:skip", "lstm:single", "fixed:dual with feedback", "two recurrent layers"],
)
def test_every_layer_that_writes_or_reads_a_state_has_its_figures(changes: dict[str, Any], names: list[str]) -> None:
    figures = figures_of(small_model(**changes))
    assert list(figures) == names
    assert all(0 < value < 10 for value in figures.values())


@pytest.mark.parametrize(("gate", "keep_bias", "openness"), [("fixed", 0.0, 0.5), ("fixed", 3.0, 0.0474259)])
def test_a_fixed_gate_is_open_by_what_its_bias_does_not_keep(gate: str, keep_bias: float, openness: float) -> None:
    model = small_model(gate=gate)
    set_biases(model, keep_bias)
    assert figures_of(model)["gate_openness/1"] == pytest.approx(openness, rel=1e-5)


@pytest.mark.parametrize(("input_bias", "openness"), [(0.0, 0.2689414), (1.0, 0.5), (3.0, 0.8807971)])
def test_an_lstm_gate_is_open_by_its_input_gate(input_bias: float, openness: float) -> None:
    model = small_model(gate="lstm", cell="dual")
    set_biases(model, 0.0)
    for name, parameter in model.named_parameters():
        if name.endswith("input_bias_D"):
            torch.nn.init.constant_(parameter, input_bias)  # sigmoid(input_bias - 1)
    figures = figures_of(model)
    assert figures["gate_openness/1"] == figures["mlp_gate_openness/1"] == pytest.approx(openness, rel=1e-5)


@pytest.mark.parametrize("kind", [FixedGate, LSTMGate])
def test_openness_is_the_share_of_the_candidate_in_what_becomes_of_an_empty_state(
    kind: type[FixedGate | LSTMGate],
) -> None:
    torch.manual_seed(0)
    gate = kind(5, 4).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    candidate_weight = gate.candidate.weight if isinstance(gate, FixedGate) else gate.candidate_and_gates.weight[:4]
    hidden_BSI = torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        share_BSD = gate(torch.zeros(2, 3, 4, dtype=torch.float64), hidden_BSI) / (hidden_BSI @ candidate_weight.T)
        assert float(gate.openness(hidden_BSI)) == pytest.approx(float(share_BSD.mean()), rel=1e-5)


def test_a_state_that_shrinks_to_a_quarter_at_every_block_changes_by_three_quarters() -> None:
    model = small_model(gate="fixed")
    with torch.no_grad():
        gate = model.layers[1].cell.update.gate
        gate.candidate.weight.zero_()
        gate.bias_D.fill_(-torch.log(torch.tensor(3.0)))  # sigmoid: 1/4 is kept
    assert figures_of(model, segments=2)["state_change/1"] == pytest.approx(0.75)


def test_attention_is_the_share_of_the_states_heads_in_the_output() -> None:
    model = small_model()
    output = model.layers[1].tokens.attention_output.weight
    inner = output.shape[1] // 2
    with torch.no_grad():
        output[:, inner:] = 0
    assert figures_of(model)["state_attention/1"] == 0
    with torch.no_grad():
        output[:, inner:] = output[:, :inner]
        output[:, :inner] = 0
    assert figures_of(model)["state_attention/1"] == pytest.approx(1)


def test_listening_changes_nothing_and_ends_with_its_block() -> None:
    model = small_model(gate="lstm")
    tokens_BL = some_tokens(2, 3 * WINDOW)
    alone, _ = model(tokens_BL)
    health = StateHealth(dict(enumerate(model.layers)))
    with health.listening(True) as heard:
        listened, _ = model(tokens_BL)
    assert torch.equal(alone, listened)
    before = heard.means(ALONE)
    model(some_tokens(2, 3 * WINDOW, seed=9))
    assert heard.means(ALONE) == before
    with health.listening(False) as nothing:
        model(tokens_BL)
    assert nothing.means(ALONE) == {}


def test_ranks_that_heard_more_weigh_more_and_ranks_that_heard_nothing_weigh_nothing() -> None:
    model = small_model()
    others = [10.0, 20.0, 30.0, 10.0, 10.0, 10.0]  # sums, then counts, of ranks that heard ten passes

    def with_others(named: dict[str, float]) -> dict[str, float]:
        return {name: mine + theirs for (name, mine), theirs in zip(named.items(), others, strict=True)}

    with StateHealth(dict(enumerate(model.layers))).listening(True) as heard:
        pass
    both: Any = SimpleNamespace(sum_named=with_others)
    assert list(heard.means(both).values()) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("name", "healthy", "dead", "meaning"),
    [
        ("gate_openness/9", 0.1, 1e-4, "the state of layer 9 is dead: its gate lets nothing in"),
        ("mlp_gate_openness/2", 0.1, 1e-4, "the state of layer 2 is dead: its second gate lets nothing in"),
        ("state_change/9", 0.1, 1e-4, "the state of layer 9 is dead: its state stands still"),
        ("state_attention/0", 0.1, 1e-3, "the state of layer 0 is dead: its tokens take nothing from the state"),
        (
            "state_gap",
            0.01,
            5e-4,
            "the state is dead, or not in use yet: putting it back at every segment costs 5.0e-04 nats",
        ),
    ],
)
def test_an_alarm_is_raised_once_and_again_only_after_the_state_lived(
    name: str, healthy: float, dead: float, meaning: str
) -> None:
    alarms = Alarms()
    raised = [alarms.new({"step": 3, "loss": 0.0, name: value}) for value in (healthy, dead, dead, healthy, dead)]
    assert [len(lines) for lines in raised] == [0, 1, 0, 0, 1]
    assert raised[1][0].startswith(meaning)


@pytest.mark.parametrize(
    ("name", "threshold"),
    [
        ("gate_openness/1", 1e-3),
        ("mlp_gate_openness/1", 1e-3),
        ("state_change/1", 1e-3),
        ("state_attention/1", 1e-2),
        ("state_gap", 1e-3),
    ],
)
def test_an_alarm_is_raised_just_below_its_threshold_and_not_just_above(name: str, threshold: float) -> None:
    assert len(Alarms().new({name: 0.999 * threshold})) == 1
    assert Alarms().new({name: 1.001 * threshold}) == []


def test_a_new_model_of_every_gate_and_cell_raises_no_alarm() -> None:
    for gate in ("fixed", "lstm"):
        for cell in ("skip", "dual", "single"):
            assert Alarms().new(figures_of(small_model(gate=gate, cell=cell))) == []


def test_a_gap_below_zero_is_a_dead_state_too() -> None:
    assert len(Alarms().new({"state_gap": -0.01})) == 1


# --- in a run ---


def test_a_run_logs_the_health_of_its_state_every_few_steps_alike_on_all_ranks(alone: Runs, pair: Runs) -> None:
    names = {"gate_openness/1", "state_change/1", "state_attention/1"}
    ours = {line["step"]: line for line in alone.metrics("plain")}
    theirs = {line["step"]: line for line in pair.metrics("plain")}
    measured = [step for step in range(1, STEPS + 1) if names & ours[step].keys()]
    assert measured == [10]
    for name in names:
        # The state's share is that of the first lane of every rank.
        tolerance = 0.1 if name.startswith("state_attention") else 1e-5
        assert theirs[10][name] == pytest.approx(ours[10][name], rel=tolerance)


def test_an_evaluation_tells_what_the_state_alone_is_worth(alone: Runs) -> None:
    for line in alone.evaluations("evaluated"):
        assert line["gap"] == pytest.approx(line["cleared"] - line["carried"])
        # Of fewer tokens than all: those behind the first segment of their document.
        assert abs(line["state_gap"]) > abs(line["state_cleared"] - line["carried"]) > 0
    assert "warning" not in (alone.folder / "evaluated.txt").read_text()
