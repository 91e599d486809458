"""Properties of the whole model: what may influence what, where gradients go, precision, dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import (
    CELLS,
    FAMILY,
    MODELS,
    POSITIONS,
    WINDOW,
    small_model,
    some_carry,
    some_tokens,
    starts_at,
    variant_name,
)
from torch import Tensor, nn

from brt_dist.model.carry import Carry, LayerCarry
from brt_dist.model.stacked_linear import parts_by_name
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.model.transformer_layer import SharedDropout, unit

EVERY_MODEL = pytest.mark.parametrize("variant", MODELS, ids=variant_name)
EVERY_CELL = pytest.mark.parametrize("variant", FAMILY, ids=variant_name)


def with_embeddings(
    model: BlockRecurrentTransformer, tokens_BL: Tensor, starts_BC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits_BLV, and the tokens' embeddings as a leaf of their own: the tied head is no way to them."""
    embedded = model.embedding(tokens_BL).detach().requires_grad_()
    handle = model.embedding.register_forward_hook(lambda module, inputs, output: embedded)
    logits, _ = model(tokens_BL, None, starts_BC)
    handle.remove()
    return logits, embedded


def reach(logits_BLV: Tensor, embedded_BLD: Tensor) -> Tensor:
    """reach_LBL: how strongly lane 0's token l depends on each token of each lane."""
    length = logits_BLV.shape[1]
    weights_V = torch.randn(logits_BLV.shape[-1], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rows_LL = torch.eye(length, dtype=torch.float64)
    (gradient_LBLD,) = torch.autograd.grad(logits_BLV[0] @ weights_V, embedded_BLD, rows_LL, is_grads_batched=True)
    return gradient_LBLD.abs().amax(-1)


# --- what may influence what ---


@EVERY_MODEL
def test_no_gradient_flows_from_a_token_to_a_later_one_nor_to_another_lane(variant: dict[str, Any]) -> None:
    model = small_model(**variant)
    length = 4 * WINDOW
    reach_LBL = reach(*with_embeddings(model, some_tokens(2, length)))
    assert (reach_LBL[:, 1] == 0).all()
    reach_LL = reach_LBL[:, 0]
    distance_LL = torch.arange(length)[:, None] - torch.arange(length)
    assert (reach_LL[distance_LL < 0] == 0).all()
    # A token reaches itself by the residual path, though attention leaves it out.
    assert (reach_LL[(distance_LL >= 0) & (distance_LL <= WINDOW)] > 0).all()


@EVERY_MODEL
def test_a_token_reaches_the_start_of_its_document_and_nothing_before_it(variant: dict[str, Any]) -> None:
    """Within a segment of 6 blocks in which documents begin at blocks 0, 2 and 5."""
    model = small_model(**variant)
    starts_BC = starts_at(2, 6, (0, 2), (0, 5), (1, 1))
    reach_LBL = reach(*with_embeddings(model, some_tokens(2, 6 * WINDOW), starts_BC))
    assert (reach_LBL[:, 1] == 0).all()
    begin_L = torch.tensor([0, 0, 2, 2, 2, 5]).repeat_interleave(WINDOW) * WINDOW
    positions_L = torch.arange(6 * WINDOW)
    own_LL = (positions_L >= begin_L[:, None]) & (positions_L <= positions_L[:, None])
    assert (reach_LBL[:, 0][~own_LL] == 0).all()
    # The last token of each document sees all of it; three layers of window alone would reach as far, too.
    for last in (2 * WINDOW - 1, 5 * WINDOW - 1, 6 * WINDOW - 1):
        assert torch.equal(reach_LBL[last, 0] > 0, own_LL[last])


def test_without_recurrence_a_token_reaches_as_far_as_layers_times_window() -> None:
    logits, embedded = with_embeddings(small_model(recurrent_layers=()), some_tokens(1, 6 * WINDOW))
    reached_L = reach(logits, embedded)[-1, 0] > 0
    first = 6 * WINDOW - 1 - 3 * WINDOW
    assert torch.equal(reached_L, torch.arange(6 * WINDOW) >= first)


@EVERY_CELL
def test_with_recurrence_a_token_reaches_to_the_first(variant: dict[str, Any]) -> None:
    logits, embedded = with_embeddings(small_model(**variant), some_tokens(1, 6 * WINDOW))
    assert (reach(logits, embedded)[-1, 0] > 0).all()


# --- where gradients go ---


def gradients_of_a_step(
    model: BlockRecurrentTransformer, blocks: int, carry: Carry | None, starts_BC: Tensor | None
) -> dict[str, Tensor | None]:
    """By parameter; of stacked matrices by part, `name[part]`."""
    tokens_BL, targets_BL = some_tokens(2, blocks * WINDOW), some_tokens(2, blocks * WINDOW, seed=5)
    loss, _, _ = model.train().loss(tokens_BL, targets_BL, carry, starts_BC)
    loss.backward()
    stacks = parts_by_name(model)
    found: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None or name not in stacks:
            found[name] = parameter.grad
        else:
            found |= {f"{name}[{part}]": rows for part, rows in enumerate(parameter.grad.chunk(stacks[name]))}
    return found


@pytest.mark.parametrize("starts", [False, True], ids=["no start inside", "a start inside"])
@EVERY_MODEL
def test_gradients_reach_every_parameter_when_a_segment_has_two_blocks(variant: dict[str, Any], starts: bool) -> None:
    model = small_model(**variant)
    for name, gradient in gradients_of_a_step(model, 2, None, starts_at(2, 2, (0, 1)) if starts else None).items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
        if name.endswith(("bias_D", "scale_H", "norm.weight")):
            assert gradient.all(), name


@EVERY_MODEL
def test_every_parameter_takes_part_even_where_no_document_starts(variant: dict[str, Any]) -> None:
    """ZeRO pairs gradients of ranks by the parameters that have one."""
    model = small_model(**variant)
    gradients = gradients_of_a_step(model, 2, some_carry(model.config, 2), starts_at(2, 2))
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    idle = {name for name, gradient in gradients.items() if gradient is not None and not gradient.any()}
    assert idle == {f"layers.{index}.initial_state_SD" for index in model.config.recurrent_layers}


@EVERY_CELL
def test_with_one_block_a_segment_the_state_update_learns_nothing(variant: dict[str, Any]) -> None:
    """A token reads the state as it was before its own block, fed back or not, and the state behind it is handed on as
    a constant. What makes the state's keys and values learns; its queries and all that comes behind them do not."""
    model = small_model(**variant)
    gradients = gradients_of_a_step(model, 1, None, None)
    idle = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
    cell = "layers.1.cell."
    update = {name for name, _ in model.named_parameters() if name.startswith(f"{cell}update.")}
    assert (
        len(update)
        == (2 if variant["gate"] == "fixed" else 3) * (2 if variant["cell"] == "dual" else 1)
        + ({"skip": 0, "dual": 2, "single": 1}[variant["cell"]])
    )
    queries = {f"{cell}projection.weight[0]", f"{cell}projection.weight[1]"}
    assert idle == update | queries | {f"{cell}scale_H", f"{cell}token_scale_H"}
    with pytest.raises(ValueError, match=f"{WINDOW} tokens has fewer than two blocks of {WINDOW}"):
        model.config.check_segment(WINDOW)


@EVERY_CELL
def test_state_ids_break_the_symmetry_between_states(variant: dict[str, Any]) -> None:
    model = small_model(num_states=4, **variant)
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


# --- the loss ---


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


# --- precision ---


@EVERY_MODEL
def test_bfloat16_stays_near_float32_over_many_segments(variant: dict[str, Any]) -> None:
    exact = small_model(**variant).bfloat16().float()
    rounded = small_model(**variant).bfloat16()
    exact_carry = rounded_carry = None
    for segment in range(4):
        tokens_BL = some_tokens(2, 2 * WINDOW, seed=segment)
        expected, exact_carry = exact(tokens_BL, exact_carry)
        logits, rounded_carry = rounded(tokens_BL, rounded_carry)
        assert logits.dtype == torch.bfloat16
        # A bfloat16 has 8 bits, 0.4 %; unit vectors of short ones, and sums that nearly cancel, are further off.
        assert_near(logits, expected, spread=0.03, largest=0.08)
        for index in exact.config.recurrent_layers:
            ours, other = (carry.layers[index].state_BSD for carry in (rounded_carry, exact_carry))
            assert ours.dtype == torch.float32
            assert_near(ours, other, spread=0.03, largest=0.04)


def assert_near(ours: Tensor, other: Tensor, spread: float, largest: float) -> None:
    """Relative to the other's norm, and to its largest entry."""
    assert (ours - other).norm() <= spread * other.norm()
    assert (ours - other).abs().max() <= largest * other.abs().max()


def test_unit_vectors_have_length_one_in_the_dtype_of_their_kind() -> None:
    vectors = 5 * torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(unit(vectors).norm(dim=-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    assert unit(vectors.bfloat16()).dtype == torch.bfloat16
    assert not unit(torch.zeros(3)).any()


# --- torch.compile ---


@pytest.fixture
def _compiler() -> Iterator[None]:
    """What the compiler has learnt in one test is of no use to another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_against_eager(layer: nn.Module, carry: LayerCarry, backend: str) -> None:
    """A graph break fails; outputs, carry and gradients are those of the layer itself, starts included."""
    starts_BC = starts_at(2, 3, (0, 0), (1, 2))
    x_BLD = torch.randn(2, 3 * WINDOW, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for run in (layer, torch.compile(layer, fullgraph=True, dynamic=False, backend=backend)):
        leaf_BLD = x_BLD.clone().requires_grad_()
        torch.manual_seed(0)
        out_BLD, left = run(leaf_BLD, carry, starts_BC)
        layer.zero_grad()
        (out_BLD.square().sum() + sum(tensor.square().sum() for tensor in Carry((left,)).tensors().values())).backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        found.append({"out": out_BLD, "x": leaf_BLD.grad, **Carry((left,)).tensors(), **gradients})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=0, atol=1e-12, msg=name)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("position", POSITIONS)
def test_an_ordinary_layer_compiles_into_one_graph_with_the_same_results(position: str) -> None:
    model = small_model(position=position).train()
    # Graphs of the backward pass are made by the same code for all: once is enough.
    backend = "aot_eager" if position == "t5" else "eager"
    compiled_against_eager(model.layers[0], some_carry(model.config, 2).layers[0], backend)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("variant", [CELLS[2], CELLS[4]], ids=variant_name)
def test_a_recurrent_layer_compiles_into_one_graph_with_the_same_results(variant: dict[str, Any]) -> None:
    model = small_model(**variant).train()
    compiled_against_eager(model.layers[1], some_carry(model.config, 2).layers[1], "eager")


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
