"""Whether a sound file is all there: what its header promises beside what the file holds.

A copy that broke off leaves a file that libsndfile reads as a shorter recording, without a word. Only what is certain
counts here: a length that a streaming tool could not know, 0 or about the largest that fits, promises nothing.
"""

from __future__ import annotations

import io
import math
import os
import struct
from contextlib import nullcontext
from typing import BinaryIO

import soundfile

from tokenizer.data.utterances import AudioError

MISSING_S = 0.01  # what may be missing: some writers count a few bytes too many
MISSING_DECODED_S = 0.15  # two frames of an MP3 at 16 kHz: its header counts them roughly
MOST_CHUNKS = 1000
OGG_PAGE_BYTES = 65307  # of the largest


def refuse_cut_off(name: str, held_s: float, promised_s: float, tolerance_s: float = MISSING_DECODED_S) -> None:
    """Raises AudioError where a file holds fewer seconds than its header promises."""
    if promised_s - held_s > tolerance_s:
        raise AudioError(
            f"{name}: cut off: it holds {held_s:.2f} s of the {promised_s:.2f} s that its header promises: copy it "
            "again, or write what there is of it to a new file"
        )


def refuse_short_read(name: str, file: soundfile.SoundFile, n_read: int) -> None:
    """Raises AudioError where fewer frames were decoded of an open file than its header promises.

    An MP3 without a header of its own promises nothing: libsndfile guesses its length from the first frame.
    """
    if n_read < file.frames and (file.format != "MP3" or _mp3_has_header(file.name)):
        refuse_cut_off(name, n_read / file.samplerate, file.frames / file.samplerate)


def check_whole(name: str, source: str | io.BytesIO, duration_s: float) -> None:
    """Reads a file's header, and of an Ogg file its end. No samples are decoded.

    Args:
        name: what a message calls it.
        source: its path, or its bytes as a file, whose position is kept.
        duration_s: seconds of sound in it, as libsndfile tells.

    Raises:
        AudioError: it is cut off.
    """
    with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
        position = file.tell()
        try:
            size = file.seek(0, os.SEEK_END)
            if _ogg_ends_within_a_page(file, size):
                raise AudioError(f"{name}: cut off: its last page is not whole: copy it again")
            promised, held = data_bytes(file, size)
        finally:
            file.seek(position)
    if promised > held > 0:
        refuse_cut_off(name, duration_s, duration_s * promised / held, MISSING_S)


def with_its_length(source: str | io.BytesIO) -> io.BytesIO | None:
    """A WAV whose writer left 0 in place of all lengths, such as a recorder that was stopped, with that of its samples.

    libsndfile finds no samples in it. None where the file is another, an empty WAV too.
    """
    with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        magic = file.read(12)
        if magic[:4] != b"RIFF" or struct.unpack("<I", magic[4:8])[0] == size - 8:
            return None
        promised, begin = _find(file, b"data", 12, "<4sI", size)
        if promised or begin >= size:
            return None
        file.seek(0)
        whole = bytearray(file.read())
    whole[begin - 4 : begin] = struct.pack("<I", min(size - begin, 0xFFFFFFFF))
    return io.BytesIO(whole)


def data_bytes(file: BinaryIO, size: int) -> tuple[int, int]:
    """Bytes of samples that the header of a file of `size` bytes promises, and that are there.

    WAV (RIFF, RIFX, RF64, BW64), AIFF, AU and Wave64 say so; (0, 0) for others, and where the length is not known.
    """
    file.seek(0)
    magic = file.read(12)
    promised, begin = 0, size
    if magic[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64"):
        promised, begin = _riff_data(file, ">" if magic[:4] == b"RIFX" else "<", size)
    elif magic[:4] == b"FORM":
        promised, begin = _find(file, b"SSND", 12, ">4sI", size)
    elif magic[:4] == b".snd":
        begin, promised = struct.unpack(">II", magic[4:12])
    elif magic[:4] == b"riff":
        promised, begin = _find(file, b"data", 40, "<16sQ", size, counts_itself=True)
    unknown = promised == 0 or 0x7F000000 <= promised <= 0x80000000 or 0xFF000000 <= promised <= 0xFFFFFFFF
    return (0, 0) if unknown else (promised, max(0, size - begin))


def _riff_data(file: BinaryIO, order: str, size: int) -> tuple[int, int]:
    """Length and place of a WAV's samples; of one beyond 4 GiB the length stands in its chunk ds64."""
    promised, begin = _find(file, b"data", 12, f"{order}4sI", size)
    _, ds64 = _find(file, b"ds64", 12, f"{order}4sI", min(size, begin))
    if promised == 0xFFFFFFFF and ds64 < begin:
        file.seek(ds64 + 8)  # behind the length of the whole
        (promised,) = struct.unpack("<Q", file.read(8))
    return promised, begin


def _find(
    file: BinaryIO, wanted: bytes, first: int, head: str, size: int, counts_itself: bool = False
) -> tuple[int, int]:
    """Length and place of what a chunk holds; (0, `size`) where there is no such chunk.

    Args:
        file: of which only the chunks' heads are read.
        wanted: the first four letters of its name.
        first: where the first chunk begins.
        head: of a chunk, its name and length, as `struct` writes it.
        size: bytes of the file.
        counts_itself: whether the length counts the head too, as in Wave64, where chunks begin at multiples of 8.
    """
    head_bytes, step = struct.calcsize(head), 8 if counts_itself else 2
    for _ in range(MOST_CHUNKS):
        file.seek(first)
        found = file.read(head_bytes)
        if len(found) < head_bytes:
            break
        name, length = struct.unpack(head, found)
        length -= head_bytes if counts_itself else 0
        if name[:4] == wanted:
            return length, first + head_bytes
        first += head_bytes + math.ceil(max(0, length) / step) * step
    return 0, size


def _mp3_has_header(source: str | io.BytesIO) -> bool:
    with open(source, "rb") if isinstance(source, str) else nullcontext(source) as file:
        position = file.tell()
        file.seek(0)
        head = file.read(10)
        if head[:3] == b"ID3":  # seven bits of the tag's length in each byte
            file.seek(10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)))
        else:
            file.seek(0)
        first_frame = file.read(256)
        file.seek(position)
    return any(mark in first_frame for mark in (b"Xing", b"Info", b"VBRI"))


def _ogg_ends_within_a_page(file: BinaryIO, size: int) -> bool:
    """Whether an Ogg file's last page is shorter than it says."""
    file.seek(0)
    if file.read(4) != b"OggS":
        return False
    file.seek(max(0, size - 2 * OGG_PAGE_BYTES))
    end = file.read()
    page = end[end.rfind(b"OggS") :]
    if len(page) < 27:  # not even its head
        return True
    n_segments = page[26]
    return len(page) < 27 + n_segments + sum(page[27 : 27 + n_segments])
