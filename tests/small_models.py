"""Models small enough for exact statements: float64, every parameter off its trivial value.

Their number of states is not their window, and heads x head width is not their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brt_dist.model.carry import Carry
from brt_dist.model.config import ModelConfig
from brt_dist.model.gates import FixedGate, LSTMGate
from brt_dist.model.transformer import BlockRecurrentTransformer

VOCAB, WINDOW = 11, 4
POSITIONS = ("t5", "rotary", "none")
# Every recurrent cell, in both ways of running the stack, with its state in the middle of three layers.
CELLS: list[dict[str, Any]] = [
    {"gate": gate, "cell": cell} for gate in ("fixed", "lstm") for cell in ("skip", "dual", "single")
]
FAMILY: list[dict[str, Any]] = [cell | {"feedback": feedback} for cell in CELLS for feedback in (False, True)]
# What is left: no recurrence, and more than one recurrent layer.
STACKS: list[dict[str, Any]] = [
    {"recurrent_layers": ()},
    {"recurrent_layers": (0, 1, 2)},
    {"recurrent_layers": (0, 2), "feedback": True},
    {"recurrent_layers": (0, 2), "gate": "lstm", "cell": "dual", "feedback": True},
]
# Every kind of position, where the stack runs whole and where it runs block by block.
PLACED: list[dict[str, Any]] = [
    {"position": position, **variant}
    for position in POSITIONS
    for variant in ({"recurrent_layers": ()}, {"gate": "fixed", "cell": "skip"}, {"feedback": True})
]
MODELS = [*FAMILY, *STACKS, *PLACED]


def variant_name(variant: Any) -> str:
    """As a test's id: `lstm:dual`, `rotary, layers 0 2, feedback`."""
    words = [variant["position"]] if "position" in variant else []
    words += [f"{variant['gate']}:{variant['cell']}"] if "gate" in variant else []
    if "recurrent_layers" in variant:
        words.append(" ".join(["layers", *map(str, variant["recurrent_layers"])]))
    words += ["feedback"] if variant.get("feedback") else []
    return ", ".join(words)


def small_config(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "dim": 6,
        "num_layers": 3,
        "num_heads": 2,
        "head_dim": 4,
        "mlp_dim": 10,
        "window": WINDOW,
        "num_states": 3,
        "recurrent_layers": (1,),
    }
    return ModelConfig(**(sizes | changes))


def small_model(seed: int = 0, **changes: Any) -> BlockRecurrentTransformer:
    """In evaluation mode; gains, scales, position biases and gates are moved so that each of them matters."""
    torch.manual_seed(seed)
    model = BlockRecurrentTransformer(small_config(**changes)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "scale_H")):
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
            if name.endswith("bias.table"):
                parameter.normal_(generator=generator)
    return model


def hold_gates(module: nn.Module, logit: float) -> None:
    """Every gate in `module` keeps sigmoid(logit) of the state and admits the rest, whatever the hidden vectors."""
    with torch.no_grad():
        for gate in module.modules():
            if isinstance(gate, FixedGate):
                gate.bias_D.fill_(logit)
            if isinstance(gate, LSTMGate):
                gate.candidate_and_gates.weight[len(gate.forget_bias_D) :].zero_()
                gate.forget_bias_D.fill_(logit - 1)
                gate.input_bias_D.fill_(1 - logit)


def some_tokens(lanes: int, length: int, seed: int = 1, vocabulary: int = VOCAB) -> Tensor:
    return torch.randint(vocabulary, (lanes, length), generator=torch.Generator().manual_seed(seed))


def some_carry(config: ModelConfig, lanes: int, seed: int = 2) -> Carry:
    """A carry that no document left behind, so that its influence shows; float64."""
    generator = torch.Generator().manual_seed(seed)
    empty = Carry.fresh(config, lanes, torch.device("cpu"), torch.float64)
    return empty.map(lambda tensor: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))


def all_lanes(carries: Sequence[Carry]) -> Carry:
    """One carry of all lanes of `carries`, in order."""
    named = [carry.tensors() for carry in carries]
    return Carry.from_tensors({name: torch.cat([each[name] for each in named]) for name in named[0]})


def starts_at(lanes: int, blocks: int, *places: tuple[int, int]) -> Tensor:
    """starts_BC, True at each (lane, block) of `places`."""
    starts_BC = torch.zeros(lanes, blocks, dtype=torch.bool)
    for lane, block in places:
        starts_BC[lane, block] = True
    return starts_BC
