"""How long documents are: a histogram, and what share of tokens lies far behind a document's beginning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from brt_dist.data.atomic_file import whole_file
from brt_dist.data.token_shards import Documents, writing

PLOT = "lengths.png"
# Positions that a context of so many tokens would not reach.
FAR = (4096, 16_384, 65_536)


def lengths_by_corpus(documents: Documents) -> dict[str, np.ndarray]:
    """Tokens of every document of each corpus."""
    return {name: documents.lengths[documents.corpus_of == number] for number, name in enumerate(documents.corpora)}


def share_beyond(length_D: np.ndarray, positions: int) -> float:
    """The share of all tokens that have at least so many tokens of their document in front of them."""
    return float(np.maximum(length_D - positions, 0).sum() / max(1, length_D.sum()))


def draw_lengths(lengths: Mapping[str, np.ndarray], folder: Path) -> Path:
    """Write the plot of document lengths into `folder` and return its path.

    On the left how many documents of each length there are, on the right the share of tokens beyond each position.
    """
    from matplotlib.figure import Figure

    drawn = {name: length_D[length_D > 0] for name, length_D in lengths.items() if (length_D > 0).any()}
    longest = max((int(length_D.max()) for length_D in drawn.values()), default=1)
    edges = np.geomspace(1, longest + 1, 61)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, length_D in drawn.items():
        left.hist(length_D, bins=edges, histtype="step", linewidth=1.5, label=name or "all documents")
        shares = [share_beyond(length_D, int(position)) for position in edges]
        (line,) = right.plot(edges, shares, linewidth=1.5, label=name or "all documents")
        for far in FAR:
            share = share_beyond(length_D, far)
            if share:
                right.plot([far], [share], "o", color=line.get_color())
                label = {"textcoords": "offset points", "xytext": (6, 5), "color": line.get_color()}
                right.annotate(f"{share:.0%}", (far, share), **label)
    left.set(xscale="log", xlabel="tokens in a document", ylabel="documents", title="Lengths of documents")
    title = "Share of tokens behind a position"
    right.set(
        xscale="log", xlabel="position in the document", ylabel="share of all tokens", title=title, ylim=(0, 1.02)
    )
    for far in FAR:
        right.axvline(far, color="0.7", linewidth=0.8, linestyle=":")
        right.annotate(f"{far // 1024}k", (far, 0.0), textcoords="offset points", xytext=(3, 4), color="0.4")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        if len(drawn) > 1:
            axes.legend(loc="upper left" if axes is left else "lower left")
    path = folder / PLOT
    with writing(path), whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
