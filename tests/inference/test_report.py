"""Figures of scored documents against their definitions."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from brt_dist.inference.report import (
    ScoredRun,
    cumulative_curve,
    evaluation_report,
    paired_difference,
    ratio_of_sums,
    run_figures,
)


def scored(nats: list[list[float]], run: str = "runs/a", **changes: Any) -> ScoredRun:
    fields: dict[str, Any] = {
        "run": run,
        "label": run,
        "step": 7,
        "clear_carry_every": None,
        "ids": [f"d{index}" for index in range(len(nats))],
        "bytes_D": np.array([10 * len(document) for document in nats]),
        "words_D": np.array([2 * len(document) for document in nats]),
        "nats": [np.array(document, dtype=np.float32) for document in nats],
    }
    return ScoredRun(**{**fields, **changes})


def random_nats(lengths: list[int], seed: int = 0) -> list[list[float]]:
    generator = np.random.default_rng(seed)
    return [generator.gamma(2.0, 1.0, n).tolist() for n in lengths]


def test_bits_are_all_nats_over_all_tokens_bytes_and_words() -> None:
    figures = run_figures(scored([[math.log(2)] * 3, [math.log(4)]]))
    assert figures["bits_per_token"] == pytest.approx(5 / 4)
    assert figures["bits_per_byte"] == pytest.approx(5 / 40)
    assert figures["bits_per_word"] == pytest.approx(5 / 8)
    assert (figures["number_of_documents"], figures["tokens"], figures["bytes"], figures["words"]) == (2, 4, 40, 8)
    assert (figures["run"], figures["step"], figures["clear_carry_every"]) == ("runs/a", 7, None)


def test_values_of_single_documents_stand_under_documents_and_sum_to_the_figures() -> None:
    figures = run_figures(scored(random_nats([5, 90, 31])))
    documents = figures["documents"]
    assert [set(document) for document in documents] == [{"id", "tokens", "bytes", "bits"}] * 3
    assert sum(d["bits"] for d in documents) / sum(d["tokens"] for d in documents) == figures["bits_per_token"]
    lists = {key for key, value in figures.items() if isinstance(value, list)}
    assert lists == {"documents"}


def test_the_standard_error_for_documents_of_one_size_is_that_of_their_mean() -> None:
    values = np.random.default_rng(1).normal(3, 1, 12)
    ratio, error = ratio_of_sums(values * 50, np.full(12, 50))
    assert ratio == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(12))


def test_the_standard_error_is_the_spread_over_repeated_draws_of_documents() -> None:
    generator = np.random.default_rng(2)
    ratios, errors = [], []
    for _ in range(1500):
        sizes = generator.lognormal(3, 0.7, 60)
        amounts = sizes * (2 + generator.normal(0, 0.3, 60)) + generator.normal(0, 3, 60)
        ratio, error = ratio_of_sums(amounts, sizes)
        assert ratio is not None
        assert error is not None
        ratios.append(ratio)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)


def test_one_document_has_no_standard_error_and_no_words_no_ratio() -> None:
    figures = run_figures(scored([[1.0, 2.0]], words_D=np.array([0])))
    assert figures["bits_per_token"] == pytest.approx(1.5 / math.log(2))
    assert figures["bits_per_token_standard_error"] is None
    assert figures["bits_per_byte_standard_error"] is None
    assert figures["bits_per_word"] is None


def test_the_curve_at_x_is_the_mean_over_all_tokens_at_positions_below_x() -> None:
    nats = [np.array(document, dtype=np.float32) for document in random_nats([3, 700, 41, 1])]
    curve = cumulative_curve(nats)
    assert curve["weighting"] == "tokens"
    for x, bits, count in zip(curve["positions"], curve["bits_per_token"], curve["documents_at_least"], strict=True):
        below = np.concatenate([document[:x] for document in nats])
        assert bits == pytest.approx(below.mean(dtype=np.float64) / math.log(2))
        assert count == sum(len(document) >= x for document in nats)


def test_the_curve_goes_from_the_first_token_to_the_end_of_the_longest_document_in_log_steps() -> None:
    nats = [np.array(document, dtype=np.float32) for document in random_nats([30, 50_000])]
    curve = cumulative_curve(nats)
    positions = curve["positions"]
    assert (positions[0], positions[-1]) == (1, 50_000)
    assert 150 <= len(positions) <= 200
    assert positions == sorted(set(positions))
    ratios = np.array(positions[100:]) / np.array(positions[99:-1])
    assert ratios.max() / ratios.min() < 1.05
    assert curve["bits_per_token"][-1] == pytest.approx(
        run_figures(scored([n.tolist() for n in nats]))["bits_per_token"]
    )


def test_a_paired_difference_has_the_error_of_the_differences_not_of_the_runs() -> None:
    generator = np.random.default_rng(3)
    base = [generator.gamma(2, 1, 200) + 3 * generator.random() for _ in range(30)]
    better = [document - 0.01 for document in base]
    a, b = scored([d.tolist() for d in base]), scored([d.tolist() for d in better], run="runs/b")
    pair = paired_difference(b, a)
    assert (pair["run"], pair["minus"]) == ("runs/b", "runs/a")
    assert pair["bits_per_token"] == pytest.approx(-0.01 / math.log(2), rel=1e-4)
    assert pair["standard_error"] < 1e-5 < 0.01 < run_figures(a)["bits_per_token_standard_error"]


def test_a_difference_beyond_a_position_leaves_out_what_stands_before_it() -> None:
    base, other = np.ones(5000), np.ones(5000)
    other[1024:] += math.log(2)
    short = np.ones(1024)
    a = scored([base.tolist(), short.tolist()])
    b = scored([other.tolist(), (short * 9).tolist()], run="runs/b")
    beyond = paired_difference(b, a)["beyond"]
    assert list(beyond) == ["1024", "4096"]
    assert beyond["1024"]["bits_per_token"] == pytest.approx(1.0)
    assert beyond["1024"]["standard_error"] is None
    assert (beyond["1024"]["number_of_documents"], beyond["1024"]["tokens"]) == (1, 5000 - 1024)


def test_runs_that_scored_other_documents_are_not_paired() -> None:
    a = scored([[1.0, 2.0], [3.0]])
    for other in (scored([[1.0, 2.0, 3.0], [3.0]]), scored([[1.0, 2.0], [3.0]], ids=["d0", "x"])):
        with pytest.raises(ValueError, match="same documents"):
            paired_difference(a, other)


def test_every_entry_is_paired_with_the_first_and_a_cleared_one_with_its_own_run() -> None:
    nats = random_nats([9, 4])
    ways = [("runs/a", None), ("runs/a", 8), ("runs/b", None), ("runs/b", 8)]
    entries = [scored(nats, run, label=f"{run} {clear}", clear_carry_every=clear) for run, clear in ways]
    report = evaluation_report("test", "hash", entries)
    assert [(pair["run"], pair["minus"]) for pair in report["differences"]] == [
        ("runs/a 8", "runs/a None"),
        ("runs/b None", "runs/a None"),
        ("runs/b 8", "runs/a None"),
        ("runs/b 8", "runs/b None"),
    ]


def test_a_report_is_json_without_nan() -> None:
    report = evaluation_report("test", "hash", [scored(random_nats([9])), scored(random_nats([9]), run="runs/b")])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report) == {"split", "shards", "notes", "runs", "differences"}
