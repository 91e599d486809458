"""A small corpus of real text and the shards made of it, shared by all tests of a session."""

from __future__ import annotations

import io
import json
import sysconfig
from pathlib import Path

import pytest
import torch
from rich.console import Console

from preprocessing.config import CorpusConfig, DocumentsConfig, ShardsConfig, SplitsConfig, TokenizerConfig
from preprocessing.prepare import prepare
from preprocessing.report import Reporter

MODULES = ("bisect", "heapq", "fnmatch", "glob", "textwrap", "queue", "sched", "keyword", "stat", "shlex", "reprlib")
VOCABULARY = 384


def pytest_configure() -> None:
    """One thread: models this small lose time to more, the more so on a shared machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON Lines: every top-level piece of a few modules of the standard library is a document, most of them short."""
    path = tmp_path_factory.mktemp("corpus") / "pieces.jsonl"
    library = Path(sysconfig.get_paths()["stdlib"])
    pieces = [
        {"id": f"{module}-{number}", "text": text}
        for module in MODULES
        for number, text in enumerate((library / f"{module}.py").read_text(encoding="utf-8").split("\n\n"))
    ]
    path.write_text("".join(json.dumps(piece) + "\n" for piece in pieces), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shards(corpus: Path) -> Path:
    """The folder of shards of `corpus`, with a vocabulary of 384; a test that changes it works on a copy."""
    folder = corpus.parent / "shards"
    prepare(
        {"": CorpusConfig(reader="jsonl", path=str(corpus))},
        DocumentsConfig(),
        TokenizerConfig(vocab_size=VOCABULARY),
        SplitsConfig(0.1, 0.1),
        ShardsConfig(str(folder), unit_bytes=50_000),
        reporter=Reporter(Console(file=io.StringIO())),
    )
    return folder
