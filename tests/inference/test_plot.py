"""The plot: what is drawn where, whatever the runs."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from brt_dist.inference import plot
from brt_dist.inference.report import ScoredRun, evaluation_report


def report_of(lengths: list[int], ways: list[tuple[str, int | None]]) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    scored = []
    for run, clear in ways:
        nats = [generator.gamma(2, 1, n).astype(np.float32) for n in lengths]
        nats[0][:20] += 50  # the first few tokens are far off
        sizes = np.array(lengths)
        ids = [f"d{index}" for index in range(len(lengths))]
        scored.append(ScoredRun(run, f"{run} {clear}", 3, clear, ids, sizes * 4, sizes, nats))
    return evaluation_report("validation", "hash", scored)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that plot_evaluation makes."""
    figures: list[Figure] = []

    class Recorded(Figure):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            figures.append(self)

    monkeypatch.setattr(plot, "Figure", Recorded)
    return figures


def panels(report: dict[str, Any], folder: Path, drawn: list[Figure]) -> tuple[Axes, Axes]:
    plot.plot_evaluation(report, folder / "x.png")
    above, below = drawn[-1].axes
    return above, below


def test_cleared_runs_are_dashed_in_the_colour_of_their_run(tmp_path: Path, drawn: list[Figure]) -> None:
    ways = [("a", None), ("a", 8), ("b", None), ("b", 8)]
    above, _ = panels(report_of([900, 40, 300], ways), tmp_path, drawn)
    a, a_cleared, b, b_cleared = above.get_lines()
    assert a.get_color() == a_cleared.get_color() != b.get_color() == b_cleared.get_color()
    assert [line.is_dashed() for line in (a, a_cleared, b, b_cleared)] == [False, True, False, True]
    legend = above.get_legend()
    assert legend is not None
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == ["a None", "a 8", "b None", "b 8"]


def test_both_panels_share_a_logarithmic_position_axis_and_documents_are_red(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    report = report_of([900, 40, 300], [("a", None)])
    above, below = panels(report, tmp_path, drawn)
    assert above.get_xscale() == below.get_xscale() == "log"
    assert above.get_xlim() == below.get_xlim() == (32, 900)
    (line,) = below.get_lines()
    assert line.get_color() == plot.RED
    assert np.array_equal(line.get_ydata(), report["runs"][0]["curve"]["documents_at_least"])
    assert "validation" in above.get_title()
    assert all(label for label in (above.get_ylabel(), below.get_ylabel(), below.get_xlabel()))


def test_the_first_tokens_do_not_set_the_scale_and_nothing_behind_them_is_cut_off(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    report = report_of([5000, 40, 3000], [("a", None), ("b", None)])
    above, _ = panels(report, tmp_path, drawn)
    low, high = above.get_ylim()
    for run in report["runs"]:
        bits, positions = np.array(run["curve"]["bits_per_token"]), np.array(run["curve"]["positions"])
        assert bits.max() > high
        assert np.all((bits[positions >= 32] > low) & (bits[positions >= 32] < high))


@pytest.mark.parametrize("lengths", [[1], [2], [50], [1] * 300, [200_000, 3], [40] * 12_000])
def test_any_set_of_documents_gives_a_picture(lengths: list[int], tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    plot.plot_evaluation(report_of([*lengths], [("a", None)]), path)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:]) == (1400, 1120)
