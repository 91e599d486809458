"""The manifest of a shard folder: what it must say, and the hash by which a change by hand is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from brt_dist.data.errors import BadInput

MANIFEST = "manifest.json"
# What `brt prepare` keeps beside the manifest; with it a lost or altered file is written again.
LEDGER = "units.jsonl"
FORMAT = 1

_KINDS = {int: "a whole number", str: "text", list: "a list", dict: "an object"}


def manifest_hash(manifest: dict[str, Any]) -> str:
    """xxh3_128, in hexadecimal, of all that a manifest says but its own key "hash"."""
    rest = {key: value for key, value in manifest.items() if key != "hash"}
    return xxhash.xxh3_128(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shard folder; BadInput if there is none, or none of ours, or one that was altered."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"no finished shards in {folder}: {path} does not exist (`brt prepare` writes it)") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as a manifest: {error} ({_manifest_advice(folder)})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise BadInput(f"{path} is not a manifest of format {FORMAT}: found {found!r} ({_manifest_advice(folder)})")
    if "hash" not in manifest:
        raise BadInput(f"{path} is not a whole manifest: it has no 'hash' ({_manifest_advice(folder)})")
    if (found := manifest_hash(manifest)) != manifest["hash"]:
        advice = _manifest_advice(folder)
        raise BadInput(f"{path} was altered: its hash is {found} and should be {manifest['hash']} ({advice})")
    if wrong := _wrong_entry(manifest):
        raise BadInput(f"{path} is not a whole manifest: {wrong} ({_manifest_advice(folder)})")
    return manifest


def _wrong_entry(manifest: dict[str, Any]) -> str | None:
    """What is missing from a manifest, or has a wrong type, among the entries that this module reads."""
    tokenizer, shards = manifest.get("tokenizer"), manifest.get("shards")
    if not isinstance(tokenizer, dict):
        return f"'tokenizer' must be an object, found {tokenizer!r}"
    if not isinstance(shards, list) or not all(isinstance(entry, dict) for entry in shards):
        return "'shards' must be a list of objects"
    wanted: list[tuple[str, dict[str, Any], str, type]] = [
        *(("", manifest, key, int) for key in ("vocab_size", "documents")),
        *(("tokenizer.", tokenizer, key, kind) for key, kind in (("hash", str), ("eos", int))),
    ]
    # Shards imported without a tokenizer say null.
    if "file" not in tokenizer or tokenizer["file"] is not None:
        wanted.append(("tokenizer.", tokenizer, "file", str))
    for number, entry in enumerate(shards):
        place = f"shards[{number}]."
        wanted += [(place, entry, key, kind) for key, kind in (("file", str), ("hash", str), ("size", int))]
        # Shards that were written before there were several corpora lack these.
        wanted += [(place, entry, key, kind) for key, kind in (("corpus", str), ("pieces", list)) if key in entry]
    wanted += [("", manifest, key, dict) for key in ("splits", "corpora") if key in manifest]
    # A long list lies in a file, which an object names.
    if not isinstance(manifest.get("sources", {}), dict):
        wanted.append(("", manifest, "sources", list))
    for place, entry, key, kind in wanted:
        value = entry.get(key)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            return f"'{place}{key}' must be {_KINDS[kind]}, found {value!r}"
    if not 0 <= tokenizer["eos"] < manifest["vocab_size"]:
        return f"'tokenizer.eos' is {tokenizer['eos']}, outside a vocabulary of {manifest['vocab_size']}"
    return None


def _manifest_advice(folder: Path) -> str:
    if (folder / LEDGER).exists():
        return "remove it and run `brt prepare` again, which writes it from the finished shards"
    return f"remove the folder {folder} and run `brt prepare` again"


def file_advice(folder: Path, manifest: dict[str, Any]) -> str:
    """What to do about a file of a shard folder that is not as its manifest says."""
    if (folder / LEDGER).exists():
        return "`brt prepare` writes it again"
    settings = manifest.get("settings")
    imported = isinstance(settings, dict) and "imported" in settings
    return f"remove the folder {folder} and run `brt {'data import' if imported else 'prepare'}` again"


def listed_files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files that belong to a shard folder: tokenizer, long lists, shards.

    Each has "file" and "hash", most have more. A list too long for the manifest lies in a file, and in its place stands
    {"file": its name, "hash": its xxh3_128, "entries": their number}.
    """
    lists = [
        value for value in manifest.values() if isinstance(value, dict) and {"file", "hash", "entries"} <= {*value}
    ]
    tokenizer = manifest["tokenizer"]
    return [*([tokenizer] if tokenizer["file"] is not None else []), *lists, *manifest["shards"]]
