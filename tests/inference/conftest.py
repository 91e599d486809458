"""Vectors files with something wrong in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Arrays = dict[str, np.ndarray]
Tamper = Callable[..., Path]
SOUND = Path(__file__).parents[1] / "reference" / "fixed_skip.npz"


@pytest.fixture
def tampered(tmp_path: Path) -> Tamper:
    """tampered(change, source): a copy of a file, fixed_skip.npz unless given, whose arrays went through `change`."""

    def copy(change: Callable[[Arrays], None], source: Path = SOUND) -> Path:
        with np.load(source) as file:
            arrays = {name: file[name] for name in file.files}
        change(arrays)
        path = tmp_path / "tampered.npz"
        np.savez(path, **arrays)
        return path

    return copy
