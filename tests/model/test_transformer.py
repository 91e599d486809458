"""Properties of the whole model: what may influence what, where gradients go, precision, dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import WINDOW, small_model, some_carry, some_tokens, starts_at
from torch import Tensor

from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.model.transformer_layer import SharedDropout, unit

POSITIONS = ["t5", "rotary", "none"]


def with_embeddings(model: BlockRecurrentTransformer, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
    """logits_BLV, and the tokens' embeddings as a leaf of their own: the tied head is no way to them."""
    embedded = model.embedding(tokens_BL).detach().requires_grad_()
    handle = model.embedding.register_forward_hook(lambda module, inputs, output: embedded)
    logits, _ = model(tokens_BL)
    handle.remove()
    return logits, embedded


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("recurrent_layers", [(), (1,), (0, 1, 2)])
def test_no_gradient_flows_from_a_token_to_a_later_one(recurrent_layers: tuple[int, ...], position: str) -> None:
    model = small_model(recurrent_layers=recurrent_layers, position=position)
    length = 4 * WINDOW
    logits, embedded = with_embeddings(model, some_tokens(1, length))
    chosen_L = logits[0] @ torch.randn(model.config.vocab_size, dtype=torch.float64)
    rows_LL = torch.eye(length, dtype=torch.float64)
    (gradient_LBLD,) = torch.autograd.grad(chosen_L, embedded, rows_LL, is_grads_batched=True)
    reach_LL = gradient_LBLD[:, 0].abs().amax(-1)
    distance_LL = torch.arange(length)[:, None] - torch.arange(length)
    assert (reach_LL[distance_LL < 0] == 0).all()
    # A token reaches itself by the residual path, though attention leaves it out.
    assert (reach_LL[(distance_LL >= 0) & (distance_LL <= WINDOW)] > 0).all()


def test_without_recurrence_a_token_reaches_as_far_as_layers_times_window_and_with_it_to_the_first() -> None:
    tokens_BL = some_tokens(1, 6 * WINDOW)
    for recurrent_layers, first in (((), 6 * WINDOW - 1 - 3 * WINDOW), ((1,), 0)):
        logits, embedded = with_embeddings(small_model(recurrent_layers=recurrent_layers), tokens_BL)
        (gradient,) = torch.autograd.grad(logits[0, -1].square().sum(), embedded)
        reached = gradient[0].abs().amax(-1).nonzero().flatten()
        assert reached[0] == first
        assert len(reached) == 6 * WINDOW - first


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("starts", [False, True], ids=["no start inside", "a start inside"])
def test_gradients_reach_every_parameter_when_a_segment_has_two_blocks(starts: bool, position: str) -> None:
    model = small_model(position=position).train()
    starts_BC = starts_at(2, 2, (0, 1)) if starts else None
    loss, _, _ = model.loss(some_tokens(2, 2 * WINDOW), some_tokens(2, 2 * WINDOW, seed=5), None, starts_BC)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_every_parameter_takes_part_even_where_no_document_starts() -> None:
    model = small_model().train()
    loss, _, _ = model.loss(
        some_tokens(2, 2 * WINDOW), some_tokens(2, 2 * WINDOW, seed=5), some_carry(model.config, 2), starts_at(2, 2)
    )
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert not model.layers[1].initial_state_SD.grad.any()


def test_with_one_block_a_segment_the_state_update_learns_nothing() -> None:
    model = small_model().train()
    loss, _, _ = model.loss(some_tokens(2, WINDOW), some_tokens(2, WINDOW, seed=5))
    loss.backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    cell = "layers.1.cell"
    assert idle == {f"{cell}.{name}" for name in ("scale_H", "token_scale_H", "update.weight", "gate.bias_D")}
    with pytest.raises(ValueError, match=f"{WINDOW} tokens has fewer than two blocks of {WINDOW}"):
        model.config.check_segment(WINDOW)


def test_state_ids_break_the_symmetry_between_states() -> None:
    model = small_model(num_states=4)
    layer = model.layers[1]
    with torch.no_grad():
        layer.initial_state_SD.copy_(layer.initial_state_SD[0].expand(4, -1))
    tokens_BL = some_tokens(2, 4 * WINDOW)
    distinct = model(tokens_BL)[1].layers[1].state_BSD
    with torch.no_grad():
        layer.cell.ids_SD.zero_()
    alike = model(tokens_BL)[1].layers[1].state_BSD
    assert distinct is not None
    assert alike is not None
    torch.testing.assert_close(alike, alike[:, :1].expand_as(alike), rtol=0, atol=1e-14)
    gaps = (distinct[:, :, None] - distinct[:, None]).abs().amax(-1) + torch.eye(4)
    assert (gaps > 1e-3).all()


def test_the_losses_are_the_cross_entropy_of_the_logits() -> None:
    model = small_model()
    tokens_BL, targets_BL = some_tokens(2, 3 * WINDOW), some_tokens(2, 3 * WINDOW, seed=5)
    targets_BL[:, ::5] = -100
    carry, starts_BC = some_carry(model.config, 2), starts_at(2, 3, (1, 2))
    logits, expected_carry = model(tokens_BL, carry, starts_BC)
    expected_BL = F.cross_entropy(logits.flatten(0, 1), targets_BL.flatten(), reduction="none").view(2, -1)
    nats, nats_BL, loss_carry = model.loss(tokens_BL, targets_BL, carry, starts_BC)
    scored_BL, scored_carry = model.token_losses(tokens_BL, targets_BL, carry, starts_BC)
    torch.testing.assert_close(nats_BL, expected_BL, rtol=0, atol=1e-12)
    torch.testing.assert_close(nats, expected_BL.sum(), rtol=0, atol=1e-11)
    assert torch.equal(scored_BL, nats_BL)
    assert nats.requires_grad
    assert not scored_BL.requires_grad
    for other in (loss_carry, scored_carry):
        assert all(torch.equal(tensor, expected_carry.tensors()[name]) for name, tensor in other.tensors().items())


@pytest.mark.parametrize(("logit_scale", "divisor"), [("sqrt_dim", 6**0.5), ("sqrt_vocab", 11**0.5)])
def test_logits_are_divided_by_the_root_of_the_width_or_of_the_vocabulary(logit_scale: str, divisor: float) -> None:
    model = small_model(logit_scale=logit_scale)
    tokens_BL = some_tokens(1, 2 * WINDOW)
    hidden_BLD, _ = model.hidden(tokens_BL, None, None)
    torch.testing.assert_close(model(tokens_BL)[0], hidden_BLD @ model.embedding.weight.T / divisor)


def test_a_segment_that_is_no_whole_number_of_blocks_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"segment of 9 tokens .* window, 4"):
        small_model()(some_tokens(1, 9))


@pytest.mark.parametrize("position", POSITIONS)
def test_bfloat16_stays_near_float32_over_many_segments(position: str) -> None:
    exact = small_model(position=position).bfloat16().float()
    rounded = small_model(position=position).bfloat16()
    exact_carry = rounded_carry = None
    for segment in range(4):
        tokens_BL = some_tokens(2, 2 * WINDOW, seed=segment)
        expected, exact_carry = exact(tokens_BL, exact_carry)
        logits, rounded_carry = rounded(tokens_BL, rounded_carry)
        assert logits.dtype == torch.bfloat16
        states = [carry.layers[1].state_BSD for carry in (rounded_carry, exact_carry)]
        for ours, other in ((logits, expected), states):
            # A bfloat16 has 8 bits, 0.4 %; unit vectors of short ones, and sums that nearly cancel, are further off.
            assert (ours - other).norm() <= 0.06 * other.norm()
            assert (ours - other).abs().max() <= 0.15 * other.abs().max()


def test_unit_vectors_have_length_one_in_the_dtype_of_their_kind() -> None:
    vectors = 5 * torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(unit(vectors).norm(dim=-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert unit(vectors.bfloat16()).dtype == torch.bfloat16
    assert not unit(torch.zeros(3)).any()


# --- dropout ---


def test_a_dropout_mask_is_the_same_for_all_lanes_and_positions() -> None:
    torch.manual_seed(0)
    dropout = SharedDropout(0.25)
    out_BLD = dropout(torch.ones(3, 5, 4000))
    assert torch.equal(out_BLD, out_BLD[:1, :1].expand_as(out_BLD))
    kept = out_BLD[0, 0] != 0
    torch.testing.assert_close(out_BLD[0, 0][kept], torch.full((int(kept.sum()),), 1 / 0.75))
    assert abs(kept.float().mean().item() - 0.75) < 0.03  # more than four standard deviations
    assert not torch.equal(out_BLD, dropout(torch.ones(3, 5, 4000)))


def test_dropout_is_only_for_training() -> None:
    model, plain = small_model(dropout=0.5), small_model()
    tokens_BL = some_tokens(2, 2 * WINDOW)
    assert torch.equal(model(tokens_BL)[0], plain(tokens_BL)[0])
    assert not torch.isclose(model.train()(tokens_BL)[0], plain(tokens_BL)[0]).all()
    assert torch.equal(plain.train()(tokens_BL)[0], plain.eval()(tokens_BL)[0])


def test_the_same_seed_gives_the_same_dropout() -> None:
    model, tokens_BL = small_model(dropout=0.3).train(), some_tokens(2, 2 * WINDOW)
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        found.append(model(tokens_BL)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
