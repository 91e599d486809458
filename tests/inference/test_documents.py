"""Scoring of whole documents: order, carry, starts and clearing, on a stand-in that remembers and on the real model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from brt_dist.data.errors import BadInput
from brt_dist.data.loader import IGNORED_TARGET
from brt_dist.inference.documents import ChosenDocuments, balanced_lanes, score_documents
from brt_dist.model.config import ModelConfig
from brt_dist.model.transformer import BlockRecurrentTransformer

EOS, WINDOW = 1, 4


class Remembering:
    """Its "nats" are the sum of all inputs of the lane since the last start, plus a thousandth of the target.

    The carry is that sum; the first call's is not a fresh one, so that a missing start shows.
    """

    def __init__(self) -> None:
        self.config = SimpleNamespace(window=WINDOW)
        self.training = True
        self.modes: list[bool] = []

    def train(self, mode: bool = True) -> Remembering:
        self.training = mode
        return self

    def token_losses(
        self, tokens: Tensor, targets: Tensor, carry: Any = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        assert starts is not None
        tokens_BL, targets_BL, starts_BC = tokens, targets, starts
        self.modes.append(self.training)
        sum_B = torch.full((len(tokens_BL),), 1e6) if carry is None else carry
        nats_BL = torch.zeros(tokens_BL.shape)
        for column in range(tokens_BL.shape[1]):
            if column % WINDOW == 0:
                sum_B = torch.where(starts_BC[:, column // WINDOW], 0.0, sum_B)
            sum_B = sum_B + tokens_BL[:, column]
            nats_BL[:, column] = sum_B + targets_BL[:, column] / 1000
        return torch.where(targets_BL == IGNORED_TARGET, 0.0, nats_BL), sum_B

    def forget_state(self, carry: Any) -> Any:
        return carry - 1000


class Texts:
    """Documents with tokens from 2 to 9."""

    def __init__(self, lengths: list[int], seed: int = 0):
        generator = np.random.default_rng(seed)
        self.texts = [generator.integers(2, 10, n).astype(np.uint16) for n in lengths]
        self.lengths = np.array(lengths, dtype=np.int64)

    def tokens(self, index: int, first: int = 0, count: int | None = None) -> np.ndarray:
        return self.texts[index][first : None if count is None else first + count]


def by_hand(text: np.ndarray, clear_every: int | None = None) -> np.ndarray:
    """What Remembering gives for a document read from its first token to its last."""
    inputs, targets = [EOS, *text.tolist()], [*text.tolist(), EOS]
    nats, total = [], 0
    for position, (token, target) in enumerate(zip(inputs, targets, strict=True)):
        total = token if clear_every and position % clear_every == 0 else total + token
        nats.append(total + target / 1000)
    return np.array(nats, dtype=np.float32)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=9),
    st.integers(1, 12),
    st.sampled_from([4, 8, 20]),
    st.sampled_from([None, 4, 8, 12, 400]),
)
def test_every_document_is_scored_from_first_to_last_with_its_own_carry(
    lengths: list[int], lanes: int, segment: int, clear_every: int | None
) -> None:
    texts = Texts(lengths)
    nats = score_documents(Remembering(), texts, EOS, lanes=lanes, segment=segment, clear_every=clear_every)
    assert len(nats) == len(lengths)
    for found, text in zip(nats, texts.texts, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, by_hand(text, clear_every))


@pytest.mark.parametrize("limit", [1, 4, 9, 50])
def test_a_limit_scores_the_first_positions_as_without_it(limit: int) -> None:
    texts = Texts([20, 0, 8, 9, 3])
    nats = score_documents(Remembering(), texts, EOS, lanes=2, segment=8, limit_tokens=limit)
    for found, text in zip(nats, texts.texts, strict=True):
        np.testing.assert_array_equal(found, by_hand(text)[:limit])


def test_chosen_documents_are_scored_as_among_all_others() -> None:
    texts = Texts([20, 5, 8, 9, 3])
    chosen = ChosenDocuments(texts, np.array([3, 0]))
    nats = score_documents(Remembering(), chosen, EOS, lanes=2, segment=8)
    for found, index in zip(nats, [3, 0], strict=True):
        np.testing.assert_array_equal(found, by_hand(texts.texts[index]))


def test_progress_counts_every_predicted_position_up_to_the_total() -> None:
    seen: list[tuple[int, int]] = []
    texts = Texts([20, 5, 8])
    score_documents(
        Remembering(), texts, EOS, lanes=1, segment=8, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (36, 36)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_dropout_is_off_while_scoring_and_as_before_afterwards() -> None:
    for training in (True, False):
        model = Remembering().train(training)
        score_documents(model, Texts([5]), EOS, lanes=1, segment=8)
        assert model.modes == [False]
        assert model.training is training


def test_the_training_mode_comes_back_after_an_error_too() -> None:
    class Failing(Remembering):
        def token_losses(self, *_: Any, **__: Any) -> tuple[Tensor, Any]:
            raise RuntimeError("no memory")

    model = Failing()
    with pytest.raises(RuntimeError, match="no memory"):
        score_documents(model, Texts([5]), EOS, lanes=1, segment=8)
    assert model.training


@pytest.mark.parametrize("clear_every", [0, -4, 6])
def test_a_carry_can_only_be_cleared_in_front_of_a_block(clear_every: int) -> None:
    with pytest.raises(BadInput, match=f"every {clear_every} tokens.* {WINDOW}$"):
        score_documents(Remembering(), Texts([5]), EOS, lanes=1, segment=8, clear_every=clear_every)


def test_a_limit_below_one_token_and_an_empty_set_are_refused() -> None:
    with pytest.raises(BadInput, match=r"^0 tokens"):
        score_documents(Remembering(), Texts([5]), EOS, lanes=1, segment=8, limit_tokens=0)
    with pytest.raises(BadInput, match="0 documents"):
        score_documents(Remembering(), Texts([]), EOS, lanes=1, segment=8)


def test_lanes_are_balanced_when_none_waits_for_the_longest_document() -> None:
    assert balanced_lanes(np.full(100, 9), most=16) == 16
    assert balanced_lanes(np.full(5, 9), most=16) == 5
    assert balanced_lanes(np.array([1000, 10, 10]), most=16) == 2
    assert balanced_lanes(np.array([0]), most=16) == 1


def real_model(**changes: Any) -> BlockRecurrentTransformer:
    sizes = {"vocab_size": 11, "dim": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 32}
    recurrent = {"window": 4, "num_states": 4, "recurrent_layers": (1,), "dropout": 0.1}
    torch.manual_seed(0)
    return BlockRecurrentTransformer(ModelConfig(**{**sizes, **recurrent, **changes}))


@pytest.mark.parametrize("position", ["t5", "rotary"])
def test_a_real_model_scores_a_document_alike_in_any_lanes_segments_and_company(position: str) -> None:
    model, texts = real_model(position=position), Texts([43, 5, 17, 30, 0, 8])
    expected = score_documents(model, texts, EOS, lanes=1, segment=8)
    for lanes, segment in ((1, 48), (3, 8), (6, 16)):
        found = score_documents(model, texts, EOS, lanes=lanes, segment=segment)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    alone = score_documents(model, ChosenDocuments(texts, np.array([2])), EOS, lanes=4, segment=8)
    np.testing.assert_allclose(alone[0], expected[2], atol=2e-5)


def test_a_real_model_scores_alike_until_its_carry_is_first_cleared_and_otherwise_behind() -> None:
    model, texts = real_model(), Texts([40])
    carried = score_documents(model, texts, EOS, lanes=1, segment=8)[0]
    cleared = score_documents(model, texts, EOS, lanes=1, segment=8, clear_every=16)[0]
    np.testing.assert_allclose(cleared[:16], carried[:16], atol=2e-5)
    assert np.abs(cleared[16:32] - carried[16:32]).max() > 1e-3


@pytest.mark.parametrize("lanes", [1, 3])
def test_forgetting_acts_at_every_multiple_of_the_segment_in_every_document(lanes: int) -> None:
    texts = Texts([30, 5, 17, 0, 8, 16])
    nats = score_documents(Remembering(), texts, EOS, lanes=lanes, segment=8, forget_state=True)
    for found, text in zip(nats, texts.texts, strict=True):
        expected = by_hand(text) - 1000 * (np.arange(len(text) + 1) // 8)
        np.testing.assert_allclose(found, expected, atol=1e-2)


def test_a_model_that_forgets_its_state_keeps_its_cache() -> None:
    texts = Texts([40])
    for model, same in ((real_model(recurrent_layers=()), True), (real_model(), False)):
        carried = score_documents(model, texts, EOS, lanes=1, segment=8)[0]
        forgotten = score_documents(model, texts, EOS, lanes=1, segment=8, forget_state=True)[0]
        cleared = score_documents(model, texts, EOS, lanes=1, segment=8, clear_every=8)[0]
        np.testing.assert_array_equal(forgotten[:8], carried[:8])
        assert np.array_equal(forgotten, carried) is same
        assert not np.array_equal(forgotten, cleared)


def test_a_forgotten_state_is_the_learned_one_in_every_lane_and_the_carry_is_not_written_to() -> None:
    model = real_model()
    _, carry = model(torch.full((3, 8), 2))
    before = carry.detach()
    forgotten = model.forget_state(carry)
    for index, layer in enumerate(forgotten.layers):
        assert torch.equal(layer.keys_BWHK, before.layers[index].keys_BWHK)
        assert torch.equal(layer.values_BWHK, before.layers[index].values_BWHK)
    state_BSD = forgotten.layers[1].state_BSD
    assert state_BSD is not None
    assert torch.equal(state_BSD, model.layers[1].initial_state_SD.expand_as(state_BSD))
    assert not state_BSD.requires_grad
    assert torch.equal(carry.layers[1].state_BSD, before.layers[1].state_BSD)


def test_a_real_model_that_was_scored_can_still_be_trained() -> None:
    model, texts = real_model(), Texts([20, 9])
    score_documents(model, texts, EOS, lanes=2, segment=8)
    logits_BLV, _ = model(torch.full((1, 8), 2))
    logits_BLV.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
