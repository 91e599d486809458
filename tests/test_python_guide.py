"""The examples of docs/python.md run, one after the other, as a reader would run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "python.md"


def test_every_example_of_the_python_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) == 5
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, str(GUIDE), "exec"), names)
    trained = float(capsys.readouterr().out.split()[0])
    assert 0 < trained < 3, "the loop teaches the model something: 5.55 is chance"
    assert names["mems2"][0].shape == (2, 1, 32, 4, 16)
