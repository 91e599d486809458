"""Evaluation during training: what it measures, and that training does not notice it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_runs import Runs

from brt_dist.checkpoint.files import load_parameters
from brt_dist.data.token_shards import TokenShards
from brt_dist.inference.documents import ChosenDocuments, score_documents
from brt_dist.model.transformer import BlockRecurrentTransformer
from brt_dist.parallel.process_groups import Axis
from brt_dist.train.evaluation import evaluate_during_training


@pytest.mark.parametrize("ranks", ["alone", "pair"])
def test_a_run_with_evaluations_trains_bit_for_bit_like_one_without(ranks: str, request: pytest.FixtureRequest):
    runs: Runs = request.getfixturevalue(ranks)
    assert [line["step"] for line in runs.evaluations("evaluated")] == [4, 8, 12]
    assert runs.evaluations("plain") == []
    assert runs.losses("evaluated") == runs.losses("plain")
    assert runs.norms("evaluated") == runs.norms("plain")
    ours, theirs = runs.checkpoint("evaluated"), runs.checkpoint("plain")
    for path in ours.iterdir():
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name


def test_every_number_of_ranks_measures_the_same(alone: Runs, pair: Runs):
    ours, theirs = pair.evaluations("evaluated"), alone.evaluations("evaluated")
    for key in ("step", "documents", "tokens"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    for key in ("carried", "cleared", "state_cleared"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-5)
    assert [line["state_gap"] for line in ours] == pytest.approx([line["state_gap"] for line in theirs], abs=1e-5)
    for line in ours:
        assert line["gap"] == pytest.approx(line["cleared"] - line["carried"])


def test_an_evaluation_is_the_mean_over_the_first_tokens_of_the_first_documents(alone: Runs, shards: Path):
    last = alone.evaluations("evaluated")[-1]
    opened = TokenShards.open(shards, "none")
    validation = opened.split("validation")
    config = alone.loaded()
    model = BlockRecurrentTransformer(config.model)
    model.load_state_dict(load_parameters(alone.checkpoint("evaluated")))
    chosen = ChosenDocuments(validation, np.arange(5))
    segment = config.data.segment
    assert last["documents"] == 5 <= len(validation)
    for key, clear_every in (("carried", None), ("cleared", segment)):
        nats = score_documents(model, chosen, opened.eos, lanes=5, segment=segment, clear_every=clear_every)
        shown = np.concatenate([each[:100] for each in nats])
        assert last["tokens"] == len(shown)
        assert last[key] == pytest.approx(float(shown.mean()), rel=1e-6)


def test_the_state_gap_is_the_mean_over_the_tokens_behind_the_first_segment(alone: Runs, shards: Path):
    last = alone.evaluations("evaluated")[-1]
    opened, config = TokenShards.open(shards, "none"), alone.loaded()
    model = BlockRecurrentTransformer(config.model)
    model.load_state_dict(load_parameters(alone.checkpoint("evaluated")))
    chosen, segment = ChosenDocuments(opened.split("validation"), np.arange(5)), config.data.segment
    kept, put_back = (
        np.concatenate([each[segment:100] for each in score_documents(model, chosen, opened.eos, **way)])
        for way in (
            {"lanes": 5, "segment": segment, "forget_state": False},
            {"lanes": 5, "segment": segment, "forget_state": True},
        )
    )
    difference = float((put_back - kept).sum(dtype=np.float64))
    assert last["state_gap"] == pytest.approx(difference / len(kept), abs=1e-6)
    assert last["state_cleared"] == pytest.approx(last["carried"] + difference / last["tokens"], abs=1e-6)


# --- with a model whose states are worth a known sum ---

SEGMENT, WINDOW = 8, 4


class KnownWorth:
    """1 nat for every token, and half a nat more in a segment in front of which the states were put back.

    Its carry tells which lanes that happened to. `scored` counts the tokens of all passes.
    """

    def __init__(self) -> None:
        self.training, self.scored = False, 0
        self.config = SimpleNamespace(window=WINDOW, recurrent_layers=(1,))

    def token_losses(
        self, tokens_BL: Tensor, targets_BL: Tensor, carry: Tensor | None = None, starts_BC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert starts_BC is not None
        was_put_back_B = torch.zeros(len(tokens_BL)) if carry is None else carry
        extra_B1 = 0.5 * (was_put_back_B * ~starts_BC[:, 0])[:, None]
        is_scored_BL = targets_BL != -100
        self.scored += int(is_scored_BL.sum())
        return is_scored_BL * (1 + extra_B1), torch.zeros(len(tokens_BL))

    def forget_state(self, carry: Tensor) -> Tensor:
        return torch.ones_like(carry)

    def train(self, mode: bool = True) -> None:
        pass


def evaluated(lengths: list[int], limit_tokens: int = 1000) -> tuple[dict[str, Any], int]:
    """The figures of documents of so many predicted tokens, and how many tokens were scored for them."""
    numbers = np.array(lengths) - 1
    documents: Any = SimpleNamespace(
        lengths=numbers,
        tokens=lambda index, first=0, count=None: np.full(numbers[index], 3)[first:][:count],
    )
    documents = ChosenDocuments(documents, np.arange(len(lengths)))
    model: Any = KnownWorth()
    processes: Any = SimpleNamespace(data=Axis(), device="cpu", sum=lambda *values: list(values))
    sizes = {"count": len(lengths), "limit_tokens": limit_tokens, "segment": SEGMENT, "lanes": 2}
    figures = evaluate_during_training(model, documents, 1, **sizes, processes=processes)
    return figures, model.scored


@pytest.mark.parametrize(
    "lengths", [[9], [16], [32], [64, 64], [5, 5, 5, 9], [9, 5, 5, 5, 5], [8, 18, 8, 3]], ids=lambda each: str(each)
)
def test_the_state_gap_is_the_same_however_long_the_documents_are(lengths: list[int]):
    figures, _ = evaluated(lengths)
    assert figures["state_gap"] == pytest.approx(0.5)
    behind = sum(max(0, length - SEGMENT) for length in lengths)
    assert figures["state_cleared"] == pytest.approx(1 + 0.5 * behind / sum(lengths))
    assert (figures["carried"], figures["cleared"], figures["tokens"]) == (1, 1, sum(lengths))


def test_documents_within_a_segment_are_not_scored_with_their_states_put_back():
    _, scored = evaluated([8, 18, 8, 3])
    assert scored == 2 * (8 + 18 + 8 + 3) + 18


@pytest.mark.parametrize(("limit_tokens", "told"), [(8, False), (9, True)])
def test_there_is_a_state_gap_where_a_token_is_shown_behind_a_segment(limit_tokens: int, told: bool):
    figures, _ = evaluated([20, 5], limit_tokens)
    assert ("state_gap" in figures) == ("state_cleared" in figures) == told
