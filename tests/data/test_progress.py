"""Long work tells how far it has come, and short work is silent where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from brt_dist.data import progress as progress_module
from brt_dist.data.progress import progress


def test_lines_tell_what_is_done_of_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "_SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), width=20)
    with progress("checking [it]", 4000, "bytes", console) as advance:
        advance(1000)
        advance(2000)
    lines = console.file.getvalue().splitlines()
    assert [line.rpartition(", ")[0] for line in lines] == [
        "checking [it]: 1,000 of 4,000 bytes (25%)",
        "checking [it]: 3,000 of 4,000 bytes (75%)",
    ]


def test_short_work_says_nothing() -> None:
    console = Console(file=io.StringIO())
    with progress("checking", 0, "bytes", console) as advance:
        advance(0)
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_bar() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress("checking", 4000, "bytes", console) as advance:
        advance(4000)
    assert "checking" in console.file.getvalue()
    assert "100%" in console.file.getvalue()
