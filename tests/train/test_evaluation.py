"""Evaluation during training: what it measures, and that training does not notice it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_runs import Runs

from brt_dist.checkpoint.files import load_parameters
from brt_dist.data.token_shards import TokenShards
from brt_dist.inference.documents import ChosenDocuments, score_documents
from brt_dist.model.transformer import BlockRecurrentTransformer


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
    for key in ("carried", "cleared"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-5)
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
