"""Figures of scored documents, with their errors over documents, as plain values for JSON.

Dimension key
  D  documents    X  points of the curve
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CURVE_POINTS = 200
# Differences are also reported behind these positions, as far as documents reach: 1024, 4096, 16384 and so on.
FIRST_BEYOND, BEYOND_FACTOR = 1024, 4

NOTES = {
    "tokens": "a document of n tokens has n + 1 predicted positions: its tokens and the end of the document",
    "bits_per_byte": "all bits, those of the document ends included, over all UTF-8 bytes of the text",
    "bytes": "0, and bits per byte and word null, where shards were imported without a tokenizer: texts are not known",
    "standard_error": "over documents, of a ratio of sums (delta method); it says nothing about other seeds",
    "curve": "bits_per_token at x: mean over all tokens at positions below x, so every token weighs the same",
}


@dataclass(frozen=True, eq=False)
class ScoredRun:
    """One way of scoring one run; document d has nats[d] (n + 1 values), and as many entries everywhere else."""

    run: str
    label: str
    step: int
    clear_carry_every: int | None
    ids: Sequence[str]
    bytes_D: np.ndarray
    words_D: np.ndarray
    nats: Sequence[np.ndarray]


def evaluation_report(split: str, shards: str, scored: Sequence[ScoredRun]) -> dict[str, Any]:
    """All figures of runs that scored the same documents of the split of the shards with hash `shards`.

    `differences` pairs every entry with the first one, and a cleared one with the same run carried.
    """
    return {
        "split": split,
        "shards": shards,
        "notes": NOTES,
        "runs": [run_figures(run) for run in scored],
        "differences": [paired_difference(run, minus) for run, minus in _pairs(scored)],
    }


def run_figures(scored: ScoredRun) -> dict[str, Any]:
    """Figures of one run; values of single documents stand only under `documents`."""
    bits_D, tokens_D = _bits(scored.nats), _sizes(scored.nats)
    figures: dict[str, Any] = {
        "run": scored.run,
        "label": scored.label,
        "step": scored.step,
        "clear_carry_every": scored.clear_carry_every,
    }
    for name, sizes_D in (("token", tokens_D), ("byte", scored.bytes_D), ("word", scored.words_D)):
        ratio, error = ratio_of_sums(bits_D, sizes_D)
        figures[f"bits_per_{name}"], figures[f"bits_per_{name}_standard_error"] = ratio, error
    figures["number_of_documents"] = len(scored.nats)
    for name, sizes_D in (("tokens", tokens_D), ("bytes", scored.bytes_D), ("words", scored.words_D)):
        figures[name] = int(np.sum(sizes_D))
    figures["curve"] = cumulative_curve(scored.nats)
    figures["documents"] = [
        {"id": name, "tokens": int(tokens), "bytes": int(size), "bits": float(bits)}
        for name, tokens, size, bits in zip(scored.ids, tokens_D, scored.bytes_D, bits_D, strict=True)
    ]
    return figures


def ratio_of_sums(amounts_D: np.ndarray, sizes_D: np.ndarray) -> tuple[float | None, float | None]:
    """sum(amounts) / sum(sizes), and its standard error when documents are drawn independently (delta method).

    No ratio where the sizes sum to 0, no error for fewer than two documents.
    """
    amounts, sizes = np.asarray(amounts_D, dtype=np.float64), np.asarray(sizes_D, dtype=np.float64)
    total, count = sizes.sum(), len(sizes)
    if total <= 0:
        return None, None
    ratio = amounts.sum() / total
    if count < 2:
        return float(ratio), None
    squares = np.square(amounts - ratio * sizes).sum()
    return float(ratio), float(math.sqrt(count / (count - 1) * squares) / total)


def cumulative_curve(nats: Sequence[np.ndarray], points: int = CURVE_POINTS) -> dict[str, Any]:
    """Bits per token over all tokens at positions below x, for about `points` x from 1 to the longest document.

    documents_at_least: how many documents have x positions or more.
    """
    sizes_D = _sizes(nats)
    positions_X = np.unique(np.geomspace(1, sizes_D.max(), points).round().astype(np.int64))
    nats_X, tokens_X = np.zeros(len(positions_X)), np.zeros(len(positions_X), dtype=np.int64)
    for document in nats:
        shown_X = np.minimum(positions_X, len(document))
        nats_X += np.cumsum(document, dtype=np.float64)[shown_X - 1]
        tokens_X += shown_X
    at_least_X = len(nats) - np.searchsorted(np.sort(sizes_D), positions_X)
    return {
        "weighting": "tokens",
        "positions": positions_X.tolist(),
        "bits_per_token": (nats_X / tokens_X / math.log(2)).tolist(),
        "documents_at_least": at_least_X.tolist(),
    }


def paired_difference(scored: ScoredRun, minus: ScoredRun) -> dict[str, Any]:
    """`scored` minus `minus` in bits per token, document by document; negative where `scored` is better.

    `beyond` holds the same for the tokens from a position on, by the documents that reach it.
    """
    if list(scored.ids) != list(minus.ids) or not np.array_equal(_sizes(scored.nats), _sizes(minus.nats)):
        raise ValueError(f"{scored.label} and {minus.label} did not score the same documents")
    longest = int(_sizes(scored.nats).max())
    thresholds: list[int] = []
    while FIRST_BEYOND * BEYOND_FACTOR ** len(thresholds) < longest:
        thresholds.append(FIRST_BEYOND * BEYOND_FACTOR ** len(thresholds))
    return {
        "run": scored.label,
        "minus": minus.label,
        **_difference(scored.nats, minus.nats, 0),
        "beyond": {str(first): _difference(scored.nats, minus.nats, first) for first in thresholds},
    }


def _difference(nats: Sequence[np.ndarray], minus: Sequence[np.ndarray], first: int) -> dict[str, Any]:
    """Of the positions from `first` on."""
    reaching = [(a[first:], b[first:]) for a, b in zip(nats, minus, strict=True) if len(a) > first]
    tokens_D = _sizes([a for a, _ in reaching])
    bits_D = _bits([a for a, _ in reaching]) - _bits([b for _, b in reaching])
    ratio, error = ratio_of_sums(bits_D, tokens_D)
    return {
        "bits_per_token": ratio,
        "standard_error": error,
        "number_of_documents": len(reaching),
        "tokens": int(tokens_D.sum()),
    }


def _pairs(scored: Sequence[ScoredRun]) -> list[tuple[ScoredRun, ScoredRun]]:
    pairs = [(run, scored[0]) for run in scored[1:]]
    carried = {run.run: run for run in scored if run.clear_carry_every is None}
    for run in scored:
        if run.clear_carry_every is not None and carried.get(run.run, scored[0]) is not scored[0]:
            pairs.append((run, carried[run.run]))
    return pairs


def _sizes(nats: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([len(document) for document in nats], dtype=np.int64)


def _bits(nats: Sequence[np.ndarray]) -> np.ndarray:
    """Summed in float64: a document may have millions of tokens."""
    return np.array([document.sum(dtype=np.float64) for document in nats]) / math.log(2)
