"""How fast text becomes shards, beside sentencepiece alone on the same text."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from brt_dist.data.errors import BadInput
from brt_dist.data.token_shards import TokenShards
from brt_dist.data.tokenizer import Tokenizer
from preprocessing.config import CorpusConfig, DocumentsConfig, ShardsConfig, SplitsConfig
from preprocessing.corpora import list_units, read_unit
from preprocessing.documents import Document, decode
from preprocessing.repeats import find_repeats
from preprocessing.shard_unit import Recipe, write_unit
from preprocessing.units import Unit


def bench_prepare(
    corpora: Mapping[str, CorpusConfig],
    documents: DocumentsConfig,
    splits: SplitsConfig,
    shards: ShardsConfig,
    megabytes: float,
) -> dict[str, Any]:
    """Megabytes of text a CPU second, on one core, by the tokenizer in `shards.dir`; about so many from all over.

    prepare          reading, encoding, checking and writing, as `brt prepare` does it
    all_checked      the same with every document decoded again
    sentencepiece    its `encode` alone, of whole documents; by_line: of lists of their lines
    The four take turns at every unit of work, so that what else the machine does falls on all of them alike.
    """
    import sentencepiece

    path = TokenShards.open(shards.dir, verify="size").tokenizer_path
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    units = list_units(corpora, shards.unit_bytes, Path(shards.dir).resolve(), lambda line: None)
    chosen = range(0, len(units), max(1, int(units.size / 1e6 / megabytes)))
    encode = partial(plain.encode, num_threads=1, return_type="numpy")
    recipe = Recipe(corpora, documents, splits, Tokenizer.open(path), find_repeats([]))
    seconds = defaultdict[str, float](float)
    size = 0
    with TemporaryDirectory() as folder:
        for number in chosen:
            unit = units[number]
            found = (each for each in read_unit(corpora, unit, documents) if isinstance(each, Document))
            texts = [text for each in found if (text := decode(each, documents.invalid_utf8).text) is not None]
            size += sum(len(text.encode()) for text in texts)

            turns = {
                "prepare": partial(_make_shard, unit, recipe, Path(folder)),
                "sentencepiece": partial(encode, texts),
                "all_checked": partial(_make_shard, unit, replace(recipe, check_all=True), Path(folder)),
                "by_line": partial(encode, [line for text in texts for line in text.splitlines(keepends=True)]),
            }
            for name, act in turns.items():
                began = time.process_time()
                act()
                seconds[name] += time.process_time() - began
    if not size:
        raise BadInput(f"there is no text in {len(chosen)} units of the corpus")
    rates = {name: round(size / 1e6 / spent, 3) for name, spent in seconds.items()}
    return {"megabytes": round(size / 1e6, 3), "units": len(chosen), "megabytes_per_cpu_second": rates}


def _make_shard(unit: Unit, recipe: Recipe, folder: Path) -> None:
    write_unit(unit, recipe, folder, lambda news: None)
