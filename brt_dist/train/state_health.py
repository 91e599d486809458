"""Is the state alive? The known failure is a model that learns to ignore it and does not recover (paper, appendix).

A few steps of a run are listened to, with hooks on the modules: the model itself knows nothing of this.

Dimension key
  B  lanes    S  state vectors    D  model width    R  width of the heads side by side
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from brt_dist.model.gates import FixedGate, LSTMGate
from brt_dist.model.recurrent_layer import RecurrentCell, RecurrentLayer
from brt_dist.model.transformer_layer import TransformerLayer
from brt_dist.parallel.process_groups import Processes

Probe = Callable[..., Tensor]

# Below these a state is called dead, with what that means. In healthy runs of every gate and cell openness stays above
# 0.25 and attention above 0.3; the change, 0.45 to 0.8 in a new model, falls within a few steps but stays above 0.02.
DEAD = {
    "gate_openness": (1e-3, "its gate lets nothing in"),
    "mlp_gate_openness": (1e-3, "its second gate lets nothing in"),
    "state_change": (1e-3, "its state stands still"),
    "state_attention": (1e-2, "its tokens take nothing from the state"),
}
# In nats per token that a state reaches; what the paper gains by recurrence is thirty times as much.
DEAD_GAP = 1e-3


class StateHealth:
    """Figures of every layer that writes or reads a state, as `<figure>/<layer>`.

    gate_openness      mean share of the candidate that a gate lets into the state (dual has a `mlp_gate_openness` too)
    state_change       length of a block's change of a lane's state over the length of that state
    state_attention    what tokens take from the state: the length of the state heads' part of the attention's output
                       over that of both parts. (The weights themselves always sum to 1: the attention to the state has
                       a softmax of its own.)
    """

    def __init__(self, layers: Mapping[int, nn.Module]):
        """layers: by their numbers in the whole model; tensor ranks may share them."""
        self._probes: dict[str, tuple[nn.Module, Probe]] = {}
        for index, layer in layers.items():
            tokens = layer.tokens if isinstance(layer, RecurrentLayer) else layer
            if isinstance(tokens, TransformerLayer) and tokens.reads_state:
                self._probes[f"state_attention/{index}"] = tokens.attention_output, _state_share
            if isinstance(layer, RecurrentLayer):
                self._probes[f"state_change/{index}"] = layer.cell, _change
                for name, gate in layer.cell.update.named_children():
                    if isinstance(gate, FixedGate | LSTMGate):
                        self._probes[f"{name}_openness/{index}"] = gate, _openness

    @contextmanager
    def listening(self, active: bool) -> Iterator[Heard]:
        """Hears every forward pass inside, if `active`."""
        probes = self._probes if active else {}
        heard = Heard({name: [] for name in probes})
        with ExitStack() as hooks:
            for name, (module, probe) in probes.items():
                hooks.callback(module.register_forward_hook(heard.hook(name, probe)).remove)
            yield heard


class Heard:
    """What was heard of each figure on this process."""

    def __init__(self, values: dict[str, list[Tensor]]):
        self._values = values

    def hook(self, name: str, probe: Probe) -> Callable[..., None]:
        """A forward hook that keeps what `probe` tells of module, inputs and output."""

        @torch.no_grad()
        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._values[name].append(probe(module, inputs, output).double())

        return keep

    def means(self, processes: Processes) -> dict[str, float]:
        """The mean of each figure over all that all ranks heard. A collective call of those that listened."""
        sums = {name: float(torch.stack(values).sum()) if values else 0.0 for name, values in self._values.items()}
        counts = {f"number of {name}": float(len(values)) for name, values in self._values.items()}
        totals = processes.sum_named(sums | counts)
        return {
            name: total / max(1.0, totals[f"number of {name}"])
            for name, total in totals.items()
            if not name.startswith("number of ")
        }


class Alarms:
    """Says that a state is dead once, and again only if it lived in between."""

    def __init__(self) -> None:
        self._raised: set[str] = set()

    def new(self, figures: Mapping[str, Any]) -> list[str]:
        """A line for each of `figures` that says so; figures of other kinds are passed over."""
        lines = []
        for name, value in figures.items():
            line = _death(name, value)
            if line is None:
                self._raised.discard(name)
            elif name not in self._raised:
                self._raised.add(name)
                lines.append(line)
        return lines


def _death(name: str, value: Any) -> str | None:
    if name == "state_gap" and value < DEAD_GAP:
        return (
            f"the state is dead, or not in use yet: putting it back at every segment costs {value:.1e} nats per token, "
            f"less than {DEAD_GAP:.0e}"
        )
    figure, _, layer = name.partition("/")
    if figure in DEAD and value < DEAD[figure][0]:
        least, meaning = DEAD[figure]
        return f"the state of layer {layer} is dead: {meaning} ({figure} is {value:.1e}, less than {least:.0e})"
    return None


def _openness(gate: FixedGate | LSTMGate, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return gate.openness(inputs[1])


def _change(cell: RecurrentCell, inputs: tuple[Any, ...], state_BSD: Tensor) -> Tensor:
    before_BSD: Tensor = inputs[0]
    length_B = before_BSD.flatten(1).norm(dim=1).clamp(min=1e-12)
    return ((state_BSD - before_BSD).flatten(1).norm(dim=1) / length_B).mean()


def _state_share(output: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
    # One lane is enough for a mean over thousands of tokens, and costs that much less.
    tokens_1TR, states_1TR = inputs[0][:1].chunk(2, dim=-1)
    # Through the module itself, since ranks may share it; `forward`, because calling it would be heard again.
    from_tokens_T, from_states_T = (
        output.forward(torch.cat(halves, dim=-1)).float().norm(dim=-1)
        for halves in ((tokens_1TR, torch.zeros_like(states_1TR)), (torch.zeros_like(tokens_1TR), states_1TR))
    )
    return (from_states_T / (from_tokens_T + from_states_T).clamp(min=1e-12)).mean()
