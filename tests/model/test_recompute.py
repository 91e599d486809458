"""Recomputation changes neither results nor gradients nor the carry; it only keeps less for the backward pass."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from small_models import FAMILY, WINDOW, small_model, some_carry, some_tokens, starts_at, variant_name
from torch import Tensor

from brt_dist.model.recompute import Recompute, set_recompute
from brt_dist.model.transformer import BlockRecurrentTransformer

How = Literal["none", "selective", "full"]
STARTS = starts_at(2, 3, (0, 1))


def told(model: BlockRecurrentTransformer, how: Recompute, chosen: tuple[int, ...] | None = None) -> None:
    set_recompute(dict(enumerate(model.layers)), how, chosen)


def trained(model: BlockRecurrentTransformer) -> dict[str, Tensor]:
    """Loss, carry and gradients of two segments, one behind the other."""
    carry, results = some_carry(model.config, 2), {}
    for seed in (1, 2):
        tokens = some_tokens(2, 3 * WINDOW, seed)
        nats, _, carry = model.loss(tokens, tokens, carry, STARTS)
        nats.backward()
        results[f"loss {seed}"] = nats.detach()
        results |= {f"{seed} {name}": tensor for name, tensor in carry.tensors().items()}
    return results | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept(model: BlockRecurrentTransformer) -> int:
    """How many entries autograd keeps for the backward pass of a segment, parameters not counted."""
    entries: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            entries[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tokens = some_tokens(2, 8 * WINDOW)
        held = model.loss(tokens, tokens)
    del held
    return sum(entries.values())


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("variant", FAMILY, ids=variant_name)
def test_results_gradients_and_the_carry_of_two_segments_stay_bit_for_bit(variant: dict[str, Any], how: How):
    plain, again = small_model(**variant), small_model(**variant)
    told(again, Recompute(how))
    ours, theirs = trained(again), trained(plain)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("how", ["selective", "full"])
def test_dropout_has_the_same_masks_the_second_time(how: How):
    results = []
    for each in (Recompute(), Recompute(how)):
        model = small_model(dropout=0.5).train()
        told(model, each)
        torch.manual_seed(3)
        results.append(trained(model))
    for name, tensor in results[0].items():
        assert torch.equal(results[1][name], tensor), name


def test_weights_that_come_and_go_get_the_same_gradients():
    plain, again = small_model(), small_model()
    told(again, Recompute("full", weights_come=True))
    ours, theirs = trained(again), trained(plain)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-12, atol=1e-12)


def test_the_more_is_computed_again_the_less_is_kept():
    amounts = []
    for how in (Recompute(), Recompute("selective"), Recompute("full")):
        model = small_model()
        told(model, how)
        amounts.append(kept(model))
    assert amounts[0] > 1.2 * amounts[1] > 1.2 * 1.2 * amounts[2]


def test_only_chosen_layers_compute_again():
    model = small_model()
    told(model, Recompute("full"), chosen=(1,))
    assert [layer.recompute.how for layer in model.layers] == ["none", "full", "none"]
    assert model.layers[1].tokens.recompute.how == "full"


def test_nothing_is_computed_again_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("brt_dist.model.recompute.checkpoint", None)
    model = small_model()
    told(model, Recompute("full"))
    tokens = some_tokens(2, 2 * WINDOW)
    model.token_losses(tokens, tokens)
    with pytest.raises(TypeError):
        model.loss(tokens, tokens)
