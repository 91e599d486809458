"""`brt data`: the subcommands about token shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

data = typer.Typer(rich_markup_mode=None, help="Checks, shows, imports and exports token shards.")

Shards = Annotated[Path, typer.Argument(metavar="SHARDS", help="Folder of token shards.")]


@data.command()
def check(shards: Shards) -> None:
    """Checks every byte of a shard folder.

    Hashes of all files, ids inside the vocabulary, documents and tokens as the manifest counts them. Exit status 0 and
    one line of totals if all is well, else 2 and one line with the first range of bytes that is wrong.

    \b
    Example:
      brt data check shards/books
    """
    from brt_dist.data.check import check_shards

    print(check_shards(shards), flush=True)


@data.command()
def show(
    shards: Shards,
    document: Annotated[str | None, typer.Option(metavar="ID", help="Print this document.")] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Its token ids, one a line, in place of its text.")] = False,
) -> None:
    """Prints a document, or what the shards hold.

    The text goes to standard output exactly as it was, with nothing added; facts about it go to standard error.

    \b
    Examples:
      brt data show shards/books
      brt data show shards/books --document pg1342.txt > pg1342.txt
    """
    from brt_dist.data import show
    from brt_dist.data.token_shards import TokenShards

    opened = TokenShards.open(shards, verify="size")
    if document is None:
        print(show.table(opened), flush=True)
        return
    found = opened.split("all").only(document)
    print(show.facts(found), file=sys.stderr, flush=True)
    content = "".join(f"{token}\n" for token in found.tokens(0)) if tokens else show.text(opened, found)
    sys.stdout.buffer.write(content.encode())
    sys.stdout.buffer.flush()


@data.command("import")
def import_(
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX", help="Datasets: PREFIX.bin and PREFIX.idx.")],
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="New folder of token shards.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="M.model", help="sentencepiece model of the tokens.", show_default=False)
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(metavar="N", help="Without a model: how many ids there are.", show_default=False)
    ] = None,
    eos: Annotated[
        int | None, typer.Option(metavar="ID", help="Without a model: the id that ends documents.", show_default=False)
    ] = None,
    validation: Annotated[float, typer.Option(metavar="F", help="Share of the documents for validation.")] = 0.1,
    test: Annotated[float, typer.Option(metavar="F", help="Share of the documents for tests.")] = 0.1,
    split_at_eos: Annotated[
        bool, typer.Option("--split-at-eos", help="EOS inside a document begins another one.")
    ] = False,
) -> None:
    """Makes token shards of Megatron datasets.

    Datasets of Megatron-LM and GPT-NeoX are read with megatron-core. Each of several becomes a corpus of its own.
    Without a sentencepiece model the shards can be trained on, but their texts cannot be shown, and scores per byte and
    word are not known.

    \b
    Examples:
      brt data import megatron/books_text_document shards/books --tokenizer llama.model
      brt data import neox/code neox/books shards/mixed --vocab-size 50277 --eos 0 --validation 0.01 --test 0.01
    """
    from brt_dist.data.interchange import Vocabulary, import_datasets

    vocabulary = Vocabulary.of(tokenizer, vocab_size, eos)
    print(import_datasets(prefixes, shards, vocabulary, validation, test, split_at_eos), flush=True)


@data.command()
def export(
    shards: Shards,
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="PREFIX.bin and PREFIX.idx are written.")],
    split: Annotated[str, typer.Option(help="Which documents: train, validation, test or all.")] = "train",
    eos: Annotated[bool, typer.Option("--eos/--no-eos", help="EOS behind every document.")] = True,
) -> None:
    """Makes a Megatron dataset of token shards.

    Each document is one sequence. Ids and sources of documents have no place in that format.

    \b
    Example:
      brt data export shards/books megatron/books --split all
    """
    from brt_dist.data.interchange import export_shards

    print(export_shards(shards, prefix, split, end_with_eos=eos), flush=True)
