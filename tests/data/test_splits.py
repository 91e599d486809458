"""Which documents are held back never changes: shards made long ago must agree with those of today."""

from __future__ import annotations

from brt_dist.data.splits import split_of


def test_the_split_of_a_document_is_the_same_in_every_release() -> None:
    names = [f"document {number}" for number in range(12)]
    assert "".join(split_of(name, 0.3, 0.3)[0] for name in names) == "tvttvtvtvvtt"


def test_the_shares_are_kept_and_a_document_stays_where_it_is_when_the_other_share_grows() -> None:
    names = [f"{number}.txt" for number in range(20_000)]
    splits = [split_of(name, 0.1, 0.2) for name in names]
    assert abs(splits.count("validation") - 2000) < 200
    assert abs(splits.count("test") - 4000) < 200
    more = [split_of(name, 0.1, 0.4) for name in names]
    assert all(new == old for old, new in zip(splits, more, strict=True) if old != "train")
    assert {split_of(name, 0, 0) for name in names} == {"train"}
