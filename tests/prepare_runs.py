"""Runs of `prepare` on a small folder of texts, for the tests of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from brt_dist.data.token_shards import TokenShards
from brt_dist.data.tokenizer import SPACE_MARK
from preprocessing import prepare as prepare_module
from preprocessing.config import CorpusConfig, DocumentsConfig, ShardsConfig, SplitsConfig, TokenizerConfig
from preprocessing.prepare import prepare
from preprocessing.report import Reporter
from preprocessing.shard_unit import write_unit
from preprocessing.units import Unit

SENTENCE = "The quick brown fox jumps over the lazy dog;\tpack my box with\r\n  five dozen liquor jugs. "
TEXTS = {f"{number:02}.txt": f"{number} {SPACE_MARK} " + SENTENCE * number + "\n" for number in range(1, 25)}


class Run:
    """One `prepare` of a folder of text files, with settings that a test can change."""

    def __init__(self, folder: Path):
        self.corpus = CorpusConfig(path=str(folder / "corpus" / "*.txt"))
        self.corpora: dict[str, CorpusConfig] = {}
        self.documents = DocumentsConfig()
        self.tokenizer = TokenizerConfig(vocab_size=330)
        self.splits = SplitsConfig(0.2, 0.2)
        self.shards = ShardsConfig(dir=str(folder / "shards"), unit_bytes=5000)
        self.check_round_trip = False
        self.folder = folder / "shards"
        self.printed = ""

    def __call__(self, threads: int = 1) -> TokenShards:
        text = io.StringIO()
        try:
            parts = (self.corpora or {"": self.corpus}, self.documents, self.tokenizer, self.splits, self.shards)
            reporter = Reporter(Console(file=text, width=120))
            path = prepare(*parts, threads=threads, check_round_trip=self.check_round_trip, reporter=reporter)
        finally:
            self.printed = text.getvalue()
        return TokenShards.open(path.parent)

    def files(self) -> dict[str, bytes]:
        """Every file of the shard folder with its content."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir()} if self.folder.exists() else {}


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int) -> list[int]:
    """Make `prepare` die in the unit after `units`; the list gets the number of each unit that is begun."""
    begun: list[int] = []

    def dying(unit: Unit, *rest: object) -> object:
        begun.append(unit.number)
        if len(begun) > units:
            raise KeyboardInterrupt
        return write_unit(unit, *rest)

    monkeypatch.setattr(prepare_module, "write_unit", dying)
    return begun
