"""Text to tokens and back without loss. The door of sentencepiece.

sentencepiece writes a space as U+2581 inside, so a U+2581 of the text would come back as a space. Here the text is cut
at that character, and the ids of its three UTF-8 bytes are put between the parts: every sentencepiece decoder turns
those bytes back into U+2581, so the tokens need no decoder of ours.

A vocabulary of bytes is a sentencepiece model too, one with nothing but byte pieces; its tokens are computed directly.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import sentencepiece
import xxhash

from brt_dist.data.errors import BadInput

Item = TypeVar("Item")

SPACE_MARK = "\u2581"
# The special ids of the tokenizers made here: in a trained one unknown and end of document; in a vocabulary of bytes
# those of the paper's (T5's order, byte b has id b + 3, one id behind the bytes is unused).
TRAINED_UNK, TRAINED_EOS = 0, 1
BYTES_PAD, BYTES_EOS, BYTES_UNK, BYTES_FIRST, BYTES_SIZE = 0, 1, 2, 3, 260

# Threads change nothing about the pieces, but their number is recorded in the model file: fixed, so that the same
# sample gives the same file on every machine.
_TRAINING_THREADS = 8
# Longer blocks are left out by the trainer; bytes.
_LONGEST_BLOCK = 20_000
# Small pieces of text encode fastest (a priority queue per piece), and there are enough of them for all threads.
_CHUNK = 512
# sentencepiece needs about fifty bytes for each character of a piece: longer lines are cut, and there alone tokens may
# differ from those of the whole.
_LONGEST_LINE = 1 << 22
# Characters handed over in one call, so that the tokens of a long document come in bounded portions.
_TOGETHER = 1 << 20
# Tokens decoded in one call.
_DECODED_TOGETHER = 1 << 18

# What tokenizers lose: white space, control characters, compatibility forms, bytes that look like pieces, the mark.
HARD_TEXTS = (
    "def f(x):\n\treturn  x  # \ufb01\u2460\r\n",
    "  leading and trailing  ",
    "\n\n\n \n\t\n",
    " ",
    "\r",
    "\ufeffbyte order mark",
    "a\x00b\x01\x7f\x85\u2028",
    "no\u00a0break\u3000space",
    "e\u0301 \u00e9 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0010ffff",
    "<0x0A></s><unk><s>\n<0xE2>",
    SPACE_MARK,
    f" {SPACE_MARK}{SPACE_MARK} a{SPACE_MARK}b\n{SPACE_MARK}",
    "1234567890 3.14159",
)


class Tokenizer:
    """A sentencepiece model, our own or any other that has an end-of-sentence piece."""

    def __init__(self, model: bytes, name: str = "the tokenizer"):
        """`model` is the content of a sentencepiece model file; BadInput, with `name`, if it is none."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise BadInput(f"{name} is not a sentencepiece model ({len(model)} bytes)") from None
        if self._processor.eos_id() < 0:
            raise BadInput(f"{name} has no end-of-sentence piece, which is needed between documents")
        self.hash = xxhash.xxh3_128(model).hexdigest()

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a `.model` file; BadInput if it cannot be read."""
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise BadInput(f"tokenizer {path} cannot be read: {error.strerror}") from None

    @cached_property
    def vocab_size(self) -> int:
        return int(self._processor.get_piece_size())

    @cached_property
    def eos(self) -> int:
        """The id between documents; no text encodes to it."""
        return int(self._processor.eos_id())

    def encode(self, text: str) -> np.ndarray:
        """The tokens of `text`, without EOS, int32."""
        return self.encode_all([text], threads=1)[0]

    def encode_all(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """The tokens of each text, without EOS, int32; the same whatever the number of threads."""
        if self._first_byte is not None:
            return [np.add(np.frombuffer(text.encode(), np.uint8), self._first_byte, dtype=np.int32) for text in texts]
        cuts = [list(self._cut(text)) for text in texts]
        encoded = self._encode_pieces((piece for cut in cuts for piece in cut), threads)
        return [self._joined(cut, list(islice(encoded, len(cut)))) for cut in cuts]

    def _joined(self, cut: Sequence[str], encoded: Sequence[np.ndarray]) -> np.ndarray:
        """The tokens of all parts of one text, without those of what `_cut` put in front of a part."""
        tokens = [
            each if piece == SPACE_MARK else each[self._lead_count :] for piece, each in zip(cut, encoded, strict=True)
        ]
        return np.concatenate([np.zeros(0, np.int32), *encoded[:1], *tokens[1:]])

    def _encode_pieces(self, pieces: Iterable[str], threads: int) -> Iterator[np.ndarray]:
        """The tokens of each piece; U+2581 alone stands for its three bytes."""
        mark = np.array(self._mark_ids or [], np.int32)
        for portion in portions(pieces, len, _TOGETHER):
            plain = [piece for piece in portion if piece != SPACE_MARK]
            encoded = iter(self._processor.encode(plain, num_threads=threads, return_type="numpy") if plain else ())
            yield from (mark if piece == SPACE_MARK else next(encoded) for piece in portion)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of `tokens`; EOS and other control pieces have none."""
        return "".join(self.decode_parts(tokens))

    def decode_parts(self, tokens: Sequence[int] | np.ndarray) -> Iterator[str]:
        """The text of `tokens` in parts: sentencepiece needs some thirty bytes for each token that it decodes."""
        ids = np.asarray(tokens, np.int32)
        letter = self._letter
        start = 0
        while start < len(ids):
            stop = start + _DECODED_TOGETHER if letter is not None else len(ids)
            while stop < len(ids) and int(ids[stop]) in self._inner_bytes:
                stop += 1
            # Later parts behind a letter, for what stands in front of a text may lose its space.
            front = [] if start == 0 or letter is None else [letter]
            together: Any = np.concatenate([np.array(front, np.int32), ids[start:stop]])
            yield str(self._processor.decode(together))[len(front) :]
            start = stop

    def is_exact(self, text: str) -> bool:
        """Whether `text` comes back from its tokens unchanged."""
        return self.decode(self.encode(text)) == text

    @cached_property
    def _first_byte(self) -> int | None:
        """The id of byte 0 where a text's tokens are simply its bytes, in order; None for every other model."""
        model = self._processor
        named = [n for n in range(self.vocab_size) if not model.is_control(n) and not model.is_unknown(n)]
        if len(named) != 256 or not all(model.is_byte(number) for number in named):
            return None
        first = model.piece_to_id("<0x00>")
        in_order = named == list(range(first, first + 256)) == [model.piece_to_id(f"<0x{n:02X}>") for n in range(256)]
        # A model that writes a space as U+2581, or adds one in front, has other bytes.
        return first if in_order and model.encode("a b") == [first + byte for byte in b"a b"] else None

    @cached_property
    def _letter(self) -> int | None:
        """A token that decodes to one letter, or None where the vocabulary has none."""
        found = (self._processor.piece_to_id(name) for name in ("e", "<0x65>"))
        return next((number for number in found if self._processor.decode([number]) == "e"), None)

    @cached_property
    def _inner_bytes(self) -> frozenset[int]:
        """The byte pieces that only go on with a character; tokens are never cut in front of them."""
        ids = (self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(0x80, 0xC0))
        return frozenset(number for number in ids if self._processor.is_byte(number))

    @cached_property
    def _mark_ids(self) -> list[int] | None:
        """The byte pieces of U+2581, or None for a model without byte pieces."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        return ids if all(self._processor.is_byte(number) for number in ids) else None

    @cached_property
    def _lead(self) -> str | None:
        """What stands in front of a part of a text, so that it has the tokens which it has in the whole text.

        Nothing, or a newline where the model adds a space in front of a text: the newline has it then, and both are
        taken away again. None where text must not be cut behind a newline: some piece joins it to something else, or
        what stands around it is changed.
        """
        names = (self._processor.id_to_piece(number) for number in range(self.vocab_size))
        if any("\n" in name and name != "\n" for name in names):
            return None
        encode = self._processor.encode
        probes = (("a\n", "b"), ("a \n", " b"), ("\n", "\n"), ("a\n", "\n\n a"), ("a\n", "  "))

        def is_kept(lead: str) -> bool:
            count = len(encode(lead))
            return all(encode(first + last) == encode(first) + encode(lead + last)[count:] for first, last in probes)

        return next(filter(is_kept, ("", "\n")), None)

    @cached_property
    def _lead_count(self) -> int:
        """The number of tokens of `_lead`."""
        return len(self._processor.encode(self._lead or ""))

    def _cut(self, text: str) -> Iterator[str]:
        """Parts of `text`, all but the first behind `_lead`, whose tokens laid end to end are those of the whole.

        Every U+2581 is a part of its own, without anything in front.
        """
        lead = ""
        for part in self._parts(text):
            yield part if part == SPACE_MARK else lead + part
            lead = self._lead or ""

    def _parts(self, text: str) -> Iterator[str]:
        parts = re.split(f"({SPACE_MARK})", text) if self._mark_ids is not None and SPACE_MARK in text else [text]
        for part in parts:
            if self._lead is not None and len(part) > _CHUNK:
                for chunk in line_chunks(part, _CHUNK):
                    yield from (chunk[at : at + _LONGEST_LINE] for at in range(0, len(chunk), _LONGEST_LINE))
            elif part:
                yield part


def line_chunks(text: str, size: int) -> Iterator[str]:
    """Cut `text` behind newlines into chunks of at most `size` characters, or of one line where a line is longer."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind("\n", start, start + size) + 1 or text.find("\n", start + size) + 1
        if cut == 0:
            break
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def portions(items: Iterable[Item], size: Callable[[Item], int], together: int) -> Iterator[list[Item]]:
    """Neighbouring items in lists, each of which is full as soon as its sizes add up to `together`."""
    portion: list[Item] = []
    held = 0
    for item in items:
        portion.append(item)
        held += size(item)
        # An item that was let go of must not stay because of this name.
        del item
        if held >= together:
            yield portion
            portion, held = [], 0
    if portion:
        yield portion


def train_tokenizer(blocks: Iterable[str], kind: Literal["bpe", "unigram"], vocab_size: int) -> bytes:
    """Train a lossless sentencepiece model on `blocks` of text and return its file's content.

    The same blocks in the same order give the same bytes. Newline and tab are pieces of their own, which no other piece
    contains; unknown characters become bytes; nothing is normalised. BadInput, with both numbers, if the text does not
    give that many pieces, or needs more.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_blocks(blocks),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            max_sentence_length=_LONGEST_BLOCK,
            character_coverage=0.9995,
            unk_id=TRAINED_UNK,
            eos_id=TRAINED_EOS,
            bos_id=-1,
            pad_id=-1,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise BadInput(_training_error(str(error), vocab_size)) from None
    return model.getvalue()


def _training_blocks(blocks: Iterable[str]) -> Iterator[str]:
    """Blocks the trainer takes: short enough, and without U+2581, which it would count as a space."""
    for block in blocks:
        clean = block.replace(SPACE_MARK, "\n")
        step = _LONGEST_BLOCK // 4
        for start in range(0, len(clean), step):
            yield clean[start : start + step]


def _training_error(message: str, vocab_size: int) -> str:
    if found := re.search(r"set it to a value <= (\d+)", message):
        return f"tokenizer.vocab_size {vocab_size} is too large for this text, which gives at most {found[1]} pieces"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"tokenizer.vocab_size {vocab_size} is too small: bytes and single characters alone are {found[1]}"
    if "sentences_.empty()" in message:
        return "there is no text to train the tokenizer on"
    return f"the tokenizer could not be trained: {' '.join(message.split())}"


def byte_tokenizer() -> bytes:
    """A vocabulary of bytes, the paper's 260 ids for byte-level PG19: a sentencepiece model's file content."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    kinds = proto.ModelProto.SentencePiece
    pieces = {BYTES_PAD: ("<pad>", kinds.CONTROL), BYTES_EOS: ("</s>", kinds.CONTROL)}
    pieces |= {BYTES_UNK: ("<unk>", kinds.UNKNOWN), BYTES_SIZE - 1: ("<unused>", kinds.CONTROL)}
    pieces |= {BYTES_FIRST + byte: (f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)}
    model = proto.ModelProto()
    for _, (piece, kind) in sorted(pieces.items()):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    ids = {"pad_id": BYTES_PAD, "eos_id": BYTES_EOS, "unk_id": BYTES_UNK, "bos_id": -1}
    trainer = {"model_type": proto.TrainerSpec.BPE, "byte_fallback": True, "vocab_size": BYTES_SIZE, **ids}
    for key, value in trainer.items():
        setattr(model.trainer_spec, key, value)
    model.normalizer_spec.name = "identity"
    for key in ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        setattr(model.normalizer_spec, key, False)
    content: bytes = model.SerializeToString(deterministic=True)
    return content
