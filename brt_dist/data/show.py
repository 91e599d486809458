"""`brt data show`: a document of a shard folder back, or what there is in the folder."""

from __future__ import annotations

from brt_dist.data.documents import Documents
from brt_dist.data.token_shards import SPLITS, TokenShards
from brt_dist.data.tokenizer import Tokenizer


def facts(document: Documents) -> str:
    """One line about a single document."""
    tokens, size, corpus = int(document.lengths[0]), int(document.bytes[0]), document.corpora[document.corpus_of[0]]
    told = [
        *([f"corpus {corpus}"] if corpus else []),
        f"split {document.splits[0]}",
        f"source {document.sources[0]}",
        f"{tokens:,} tokens",
        f"{size:,} bytes" if size else "bytes unknown",
    ]
    return f"{document.ids[0]}: {', '.join(told)}"


def text(shards: TokenShards, document: Documents) -> str:
    """The text of a single document, decoded: exact where the tokenizer is lossless."""
    return Tokenizer.open(shards.tokenizer_path).decode(document.tokens(0))


def table(shards: TokenShards) -> str:
    """Documents, tokens and bytes of every corpus and split, in aligned lines."""
    rows: list[tuple[str, ...]] = [("corpus", "split", "documents", "tokens", "bytes")]
    for split in SPLITS:
        documents = shards.split(split)
        for number, corpus in enumerate(documents.corpora):
            of_it = documents.corpus_of == number
            amounts = int(of_it.sum()), int(documents.lengths[of_it].sum()), int(documents.bytes[of_it].sum())
            rows.append((corpus or "-", split, *(f"{amount:,}" for amount in amounts)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        lines.append("  ".join([*names, *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))]))
    return "\n".join(lines)
