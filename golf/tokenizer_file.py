"""A SentencePiece model reduced to its vocabulary: nothing rides along in a file that the contest does not count.

The file is one protocol-buffer message (sentencepiece_model.proto). Kept are each piece's text, score and type, the
trainer's numbers and the normaliser's switches, each once; paths, sample sentences, the table of characters, which
only encoding needs, and every field that is unknown go.
"""

from __future__ import annotations

from collections.abc import Iterator

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # the model's fields
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of a field on the wire
NAMES = range(44, 50)  # the trainer's fields that hold the text of special pieces
LONGEST_NAME = 32
BYTE_PIECES = 260  # bytes and controls, which a text need not hold
USUAL_BYTES = 24  # of a piece, its score and type: those of the contest's tokenizers take 13 to 16


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends. Raises ValueError."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("a field is cut off")
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """(number, kind, the field as it stands, its contents) of each field of a message. Raises ValueError."""
    at = 0
    while at < len(data):
        start = at
        key, at = varint(data, at)
        kind = key & 7
        if kind == VARINT:
            _, end = varint(data, at)
        elif kind == BYTES:
            size, at = varint(data, at)
            end = at + size
        elif kind in (FIXED64, FIXED32):
            end = at + (8 if kind == FIXED64 else 4)
        else:
            raise ValueError(f"a field of kind {kind}")
        if end > len(data):
            raise ValueError("a field is cut off")
        yield key >> 3, kind, data[start:end], data[at:end]
        at = end


def message(number: int, parts: list[bytes]) -> bytes:
    """A field that holds a message."""
    inside = b"".join(parts)
    size, length = len(inside), bytearray()
    while size >= 128:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | BYTES]) + bytes([*length, size]) + inside


def lean(model: bytes) -> bytes:
    """The same pieces and numbers, and nothing else. Raises ValueError for a file that is no such message."""
    out = []
    for number, kind, _, inside in fields(model):
        if kind != BYTES or number not in (PIECES, TRAINER, NORMALIZER):
            continue
        kept = {}
        for n, k, raw, text in fields(inside):
            name = number == TRAINER and n in NAMES and len(text) <= LONGEST_NAME
            piece = number == PIECES and n <= 3
            if piece or (k != BYTES and number != PIECES and n < 64) or name:
                kept[n] = raw
        out.append(message(number, list(kept.values())))
    return b"".join(out)


def excess(model: bytes, used: int) -> int:
    """Bytes of a lean model beyond what pieces usually take: those of a text, of which so many differ, and of bytes;
    pieces that the text never holds could hold anything else."""
    return max(0, len(model) - USUAL_BYTES * (used + BYTE_PIECES))
