"""Where dropout stands: before attention, behind the MLP, before the logits (reference); nowhere on the state's path.

A model of three layers over one block calls it seven times.
"""

from __future__ import annotations

from typing import Any

import pytest
from small_models import FAMILY, WINDOW, small_model, some_tokens, variant_name
from torch import Tensor, nn

from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.model.transformer_layer import SharedDropout

LAYERS = ["layers.0", "layers.1.tokens", "layers.2"]
PLACES = [f"{layer}.{place}" for layer in LAYERS for place in ("attention_norm", "mlp")] + ["final_norm"]
EVERY_CELL = pytest.mark.parametrize("variant", FAMILY, ids=variant_name)


@EVERY_CELL
def test_dropout_follows_the_norm_before_attention_each_mlp_and_the_last_norm_and_nothing_else(
    variant: dict[str, Any],
) -> None:
    model = small_model(dropout=0.5, **variant).train()
    # The tensors themselves are kept, so that no id comes twice. Of modules in one another, the outermost counts.
    makers: dict[int, tuple[Tensor, str]] = {}
    dropped: list[str] = []

    def listen(name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, SharedDropout):
                dropped.append(makers[id(inputs[0])][1] if id(inputs[0]) in makers else "no module")
            elif isinstance(output, Tensor):
                makers[id(output)] = output, name

        module.register_forward_hook(hook)

    for name, module in model.named_modules():
        listen(name, module)
    model(some_tokens(1, WINDOW))
    assert dropped == PLACES


@EVERY_CELL
def test_what_dropout_returns_is_what_is_computed_with(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    sound_BLV = logits_with_one_halved(model, -1)
    for place in range(len(PLACES)):
        assert (logits_with_one_halved(model, place) - sound_BLV).abs().max() > 1e-6, PLACES[place]


def logits_with_one_halved(model: BlockRecurrentTransformer, place: int) -> Tensor:
    """logits_BLV where the dropout at one place returns half of what it was given; at none where place is -1."""
    calls = 0

    def halve(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output / 2 if calls - 1 == place else output

    handles = [module.register_forward_hook(halve) for module in model.modules() if isinstance(module, SharedDropout)]
    logits_BLV, _ = model(some_tokens(1, WINDOW))
    for handle in handles:
        handle.remove()
    assert calls == len(PLACES)
    return logits_BLV
