from __future__ import annotations

from pathlib import Path

import pytest
from prepare_runs import TEXTS, Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "corpus").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "corpus" / name).write_bytes(text.encode())
    return Run(tmp_path)
