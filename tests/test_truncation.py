"""A recording that was cut off is told, however it is read; one whose writer could not know its length is whole."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tokenizer.data.audio import load_audio
from tokenizer.data.pieces import AudioStore, Recording
from tokenizer.data.utterances import AudioError, Utterance
from tokenizer.long_form.long_audio import LongAudio

RATE = 16000
FORMATS = [
    ("wav", "WAV", "PCM_16"), ("wav", "WAV", "FLOAT"), ("wav", "WAV", "MS_ADPCM"), ("wav", "WAVEX", "PCM_24"),
    ("wav", "RF64", "PCM_16"), ("w64", "W64", "PCM_16"), ("aiff", "AIFF", "PCM_16"), ("au", "AU", "PCM_16"),
    ("flac", "FLAC", "PCM_16"), ("caf", "CAF", "PCM_16"), ("ogg", "OGG", "VORBIS"), ("ogg", "OGG", "OPUS"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
]  # fmt: skip


def sweep(seconds: float) -> np.ndarray:
    """(S,) a sound that no codec can leave out."""
    time_s = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(0).normal(scale=0.05, size=len(time_s))
    return (0.3 * np.sin(2 * np.pi * (300 + 40 * time_s) * time_s) + noise).astype(np.float32)


def write(path: Path, container: str, subtype: str, seconds: float = 4.0) -> Path:
    with soundfile.SoundFile(path, "w", RATE, 1, subtype, format=container) as file:
        for block in np.split(sweep(seconds), 4):
            file.write(block)
    return path


READERS = {
    "load_audio": lambda one: load_audio(one, RATE),
    "Recording": lambda one: Recording(one, RATE),
    "LongAudio": lambda one: LongAudio(one, RATE),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(("ending", "container", "subtype"), FORMATS)
@pytest.mark.parametrize("held_in_memory", [False, True], ids=["file", "bytes"])
def test_half_a_file_is_refused_and_the_whole_is_read(tmp_path, reader, ending, container, subtype, held_in_memory):
    path = write(tmp_path / f"whole.{ending}", container, subtype)
    cut = tmp_path / f"half.{ending}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    whole, half = (Utterance(one.name, one.read_bytes() if held_in_memory else str(one)) for one in (path, cut))
    reader(whole)
    with pytest.raises(AudioError, match=rf"half.{ending}: (cut off|not audio that libsndfile can read)"):
        reader(half)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("held_in_memory", [False, True], ids=["file", "bytes"])
def test_an_mp3_without_a_header_promises_nothing(tmp_path, reader, held_in_memory):
    """Its first frames are silent; from their size libsndfile guesses a recording of several times the length."""
    path = tmp_path / "quiet.mp3"
    settings = {"bitrate_mode": "VARIABLE", "compression_level": 0.3}
    with soundfile.SoundFile(path, "w", RATE, 1, "MPEG_LAYER_III", format="MP3", **settings) as file:
        for block in (np.zeros(8 * RATE, np.float32), *np.split(sweep(4.0), 4)):
            file.write(block)
    content = path.read_bytes()
    content = content[content.index(content[:2], 4) :]  # without the frame that is the header
    path.write_bytes(content)
    assert soundfile.info(path).duration > 20
    reader(Utterance("quiet.mp3", content if held_in_memory else str(path)))


@pytest.mark.parametrize("seconds", [0.5, 3.9])
def test_the_message_tells_how_much_is_there(tmp_path, seconds):
    path = write(tmp_path / "a.wav", "WAV", "PCM_16")
    path.write_bytes(path.read_bytes()[: 44 + round(2 * RATE * seconds)])
    with pytest.raises(AudioError, match=rf"a.wav: cut off: it holds {seconds:.2f} s of the 4.00 s .*: copy it again"):
        load_audio(path, RATE)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFFDB, 0x7FFFFFFF, 0x7FFFF000, 0])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_wav_whose_writer_could_not_know_its_length_is_whole(tmp_path, reader, length):
    path = write(tmp_path / "stream.wav", "WAV", "PCM_16")
    raw = bytearray(path.read_bytes())
    place = raw.find(b"data") + 4
    raw[4:8], raw[place : place + 4] = struct.pack("<I", length), struct.pack("<I", length)
    path.write_bytes(raw)
    reader(Utterance("stream", str(path)))
    reader(Utterance("stream", bytes(raw)))
    assert len(load_audio(path, RATE)) == 4 * RATE


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_flac_that_does_not_tell_its_length_is_refused_as_one_file(tmp_path, reader):
    path = write(tmp_path / "stream.flac", "FLAC", "PCM_16")
    raw = bytearray(path.read_bytes())
    raw[21] &= 0xF0  # the last 36 bits of STREAMINFO's number of samples
    raw[22:26] = bytes(4)
    path.write_bytes(raw)
    with pytest.raises(AudioError, match="stream.flac: does not say how long it is.*convert it to WAV"):
        reader(Utterance("stream", str(path)))


@pytest.mark.parametrize("behind", [b"", b"LIST\x04\x00\x00\x00INFO", b"LIST\xff\x00\x00\x00IN", b"\x00" * 40])
def test_what_follows_the_samples_says_nothing_of_them(tmp_path, behind):
    path = write(tmp_path / "a.wav", "WAV", "PCM_16")
    path.write_bytes(path.read_bytes() + behind)
    assert len(load_audio(path, RATE)) == 4 * RATE


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_an_empty_wav_stays_empty(tmp_path, reader):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    with pytest.raises(AudioError, match="none.wav: 0.0 ms of audio"):
        reader(Utterance("none", str(tmp_path / "none.wav")))


def test_a_training_leaves_it_out_with_its_name(tmp_path, caplog):
    path = write(tmp_path / "cut.wav", "WAV", "PCM_16")
    path.write_bytes(path.read_bytes()[:70000])
    good = write(tmp_path / "good.wav", "WAV", "PCM_16")
    store = AudioStore([Utterance("cut", str(path)), Utterance("good", str(good))], RATE)
    assert store.readable(0)[0].id == "good" and store.n_failed == 1
    assert "left out" in caplog.text and "cut.wav: cut off" in caplog.text
