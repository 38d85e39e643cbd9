"""Pieces of recordings: the very samples that the whole gives, at the cost of a piece; and what a store keeps."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
import soundfile

from tokenizer.data.audio import load_audio
from tokenizer.data.augmentation import AugmentationConfig, augment, draw_speed
from tokenizer.data.crops import CropConfig, TrainingCrops, validation_crops
from tokenizer.data.manifest import read_source
from tokenizer.data.mixing import TrainingAudio, epoch_item
from tokenizer.data.pieces import AudioStore, Recording
from tokenizer.data.utterances import AudioError, DataSource, Utterance


def speechlike(seconds: float, rate: int, seed: int = 0) -> np.ndarray:
    """(S,) a sweep in noise: no two pieces alike."""
    time_s = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(scale=0.05, size=len(time_s))
    return (0.3 * np.sin(2 * np.pi * (200 + 20 * np.sin(time_s)) * time_s) + noise).astype(np.float32)


def write(path, samples, rate, subtype, **settings):
    """In blocks, as libsndfile's Ogg writer needs it."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(path, "w", rate, channels, subtype, **settings) as file:
        for start in range(0, len(samples), rate):
            file.write(samples[start : start + rate])
    return Utterance(path.stem, str(path))


@pytest.fixture
def frames_read(monkeypatch):
    """Counts the frames that are decoded from then on."""
    counted = []
    real = soundfile.SoundFile.read

    def read(self, *arguments, **settings):
        found = real(self, *arguments, **settings)
        counted.append(len(found))
        return found

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    return counted


CONTAINERS = [
    ("wav", "PCM_16", {}), ("wav", "FLOAT", {}), ("wav", "MS_ADPCM", {}), ("wav", "GSM610", {}), ("flac", "PCM_24", {}),
    ("caf", "ALAC_16", {}), ("ogg", "VORBIS", {}), ("ogg", "OPUS", {}),
    ("mp3", "MPEG_LAYER_III", {"bitrate_mode": "CONSTANT", "compression_level": 0.95}),
]  # fmt: skip


@pytest.mark.parametrize(("ending", "subtype", "settings"), CONTAINERS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("wanted", [24000, 16000])
@pytest.mark.parametrize("long", [False, True])
def test_pieces_of_every_container_are_parts_of_the_whole(
    tmp_path, monkeypatch, ending, subtype, settings, wanted, long
):
    """An MP3 of a low bit rate takes bits from frames before: without a run-up it is wrong by half of full scale."""
    monkeypatch.setattr("tokenizer.data.pieces.SHORT_S", 5.0 if long else 60.0)
    utterance = write(tmp_path / f"x.{ending}", speechlike(20, 24000), 24000, subtype, **settings)
    whole, recording = load_audio(utterance, wanted), Recording(utterance, wanted)
    assert recording.n_samples == len(whole)
    exact = wanted == 24000 and not (long and ending in ("mp3", "ogg"))
    tolerance = 2e-3 if long and subtype == "OPUS" else 0 if exact else 1e-6
    rng = np.random.default_rng(1)
    for start in [0, len(whole) - 5000, *rng.integers(0, len(whole) - 5000, size=6)]:
        piece = recording.piece(start, start + 9000)
        assert piece.dtype == np.float32 and len(piece) == min(9000, len(whole) - start)
        assert np.abs(piece - whole[start : start + 9000]).max() <= tolerance


@pytest.mark.parametrize("rates", [(44100, 16000), (44100, 24000), (22050, 24000), (48000, 8000), (8000, 24000),
                                   (16000, 24000), (11025, 16000), (44056, 16000)], ids=str)  # fmt: skip
def test_a_resampled_piece_is_the_same_part_of_the_whole_resampled(tmp_path, rates):
    rate, wanted = rates
    both = np.stack([speechlike(4.3, rate, seed) for seed in (1, 2)], axis=1)
    utterance = write(tmp_path / "x.flac", both, rate, "PCM_16")
    whole, recording = load_audio(utterance, wanted), Recording(utterance, wanted)
    assert recording.n_samples == len(whole) and np.array_equal(recording.piece(0, len(whole)), whole)
    for start in (1, 4001, len(whole) - 7000, len(whole) - 10):
        assert np.abs(recording.piece(start, start + 6000) - whole[start : start + 6000]).max() <= 1e-6


@pytest.mark.parametrize("kind", ["flac", "wav", "mp3", "parquet"])
def test_a_crop_of_a_long_recording_costs_a_crop(tmp_path, frames_read, kind):
    rate, wanted, minutes = 22050, 16000, 6
    minute = speechlike(60, rate)
    path = tmp_path / f"long.{'flac' if kind == 'parquet' else kind}"
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        for number in range(minutes):
            file.write(np.roll(minute, 977 * number))
    utterance = Utterance("long", str(path))
    if kind == "parquet":
        datasets = pytest.importorskip("datasets")
        row = {"audio": {"bytes": path.read_bytes(), "path": None}, "id": "long"}
        datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "t.parquet"))
        (utterance,) = read_source(DataSource(str(tmp_path / "t.parquet")), "train", needs_text=False)
    audio = TrainingAudio([AudioStore([utterance], wanted)], [1.0], wanted, seed=3)
    crops = TrainingCrops(audio, CropConfig(crop_s=2.0), AugmentationConfig(), 8, length=10, seed=3)
    n_bytes = path.stat().st_size if kind == "parquet" else 0
    tracemalloc.start()
    items = [crops[position] for position in range(10)]
    (middle,) = validation_crops([("long", [utterance])], wanted, 2.0, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 2.2 s of speed and margin; the rate's context; one second of run-up for MP3
    assert sum(frames_read) < 11 * rate * (3.5 if kind == "mp3" else 2.5) and len(items) == 10
    assert peak < (12 << 20) + 3 * n_bytes
    whole = load_audio(utterance, wanted)
    start = (len(whole) - 2 * wanted) // 2
    assert np.abs(middle[0, 0].numpy() - whole[start : start + 2 * wanted]).max() <= 1e-6
    for position, item in enumerate(items):
        assert np.abs(item["input_values"][0].numpy() - drawn(crops, whole, position)).max() <= 1e-5


def drawn(crops, whole, position):
    """The crop as it was drawn when every recording was decoded whole: resumed runs must go on with the same."""
    rng = np.random.default_rng((crops.seed, position))
    speed = draw_speed(crops.augmentation, rng)
    length = round(crops.samples * speed) + 64
    start = int(rng.integers(0, max(1, len(whole) - length + 1)))
    crop = augment(whole[start : start + length], crops.augmentation, rng, 16000, speed)[: crops.samples]
    return np.pad(crop, (0, crops.samples - len(crop)))


@pytest.fixture
def mixed_files(tmp_path):
    """16 and 24 bits, float beyond full scale, stereo, MP3, another rate."""
    loud = 1.8 * speechlike(1.5, 16000) / 0.5
    files = [
        write(tmp_path / "a.flac", speechlike(1.5, 16000), 16000, "PCM_16"),
        write(tmp_path / "b.flac", speechlike(1.6, 16000), 16000, "PCM_24"),
        write(tmp_path / "c.wav", loud, 16000, "FLOAT"),
        write(tmp_path / "d.wav", np.stack([loud, speechlike(1.5, 16000, 4)], 1), 16000, "FLOAT"),
        write(tmp_path / "e.mp3", speechlike(2, 16000), 16000, "MPEG_LAYER_III"),
        write(tmp_path / "f.wav", speechlike(1.7, 44100), 44100, "PCM_16"),
    ]
    assert np.abs(load_audio(files[2], 16000)).max() > 1.2
    return files


def test_what_is_kept_is_what_the_file_gives_and_neither_clipped_nor_rounded(mixed_files):
    kept, unkept = AudioStore(mixed_files, 16000), AudioStore(mixed_files, 16000, cache_bytes=0)
    part = lambda n: (n // 3, n // 3 + 4000)  # noqa: E731
    for index, utterance in enumerate(mixed_files):
        for _ in range(2):  # the second time from memory
            assert np.array_equal(kept.readable(index)[1], load_audio(utterance, 16000))
            assert np.array_equal(kept.readable(index, part)[1], unkept.readable(index, part)[1])
        assert np.array_equal(unkept.readable(index)[1], load_audio(utterance, 16000))
    # two bytes a sample where 16 bits hold it
    n = [soundfile.info(u.audio).frames for u in mixed_files]
    expected = 2 * (n[0] + n[5]) + 4 * (n[1] + n[2] + n[3] + n[4])
    assert kept._kept_bytes == expected and unkept._kept_bytes == 0
    half = AudioStore(mixed_files, 16000, cache_bytes=2 * n[0])
    assert [len(half.readable(i)[1]) for i in range(6)] and half._kept_bytes == 2 * n[0]


def test_what_is_kept_is_not_decoded_again(mixed_files, frames_read):
    store = AudioStore(mixed_files, 16000)
    first = [store.readable(index)[1] for index in range(6)]
    frames_read.clear()
    assert all(np.array_equal(store.readable(index)[1], samples) for index, samples in enumerate(first))
    assert not frames_read


def cut_off(path, share=0.6):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def test_damage_is_told_and_decides_the_same_whatever_was_read_before(tmp_path, caplog):
    rate = 16000
    good = write(tmp_path / "good.flac", speechlike(3, rate), rate, "PCM_16")
    cut = write(tmp_path / "cut.flac", speechlike(3, rate), rate, "PCM_16")
    cut_off(tmp_path / "cut.flac")
    hole = write(tmp_path / "hole.flac", speechlike(30, rate), rate, "PCM_16")
    raw = bytearray((tmp_path / "hole.flac").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 3000] = bytes(3000)
    (tmp_path / "hole.flac").write_bytes(raw)
    early, middle = (lambda n: (100, 8100)), (lambda n: (n // 2 - 4000, n // 2 + 12000))
    orders = [[early, middle, early], [middle, early, early]]
    for order in orders:
        for cache in (0, 1 << 30):
            store = AudioStore([cut, hole, good], rate, cache)
            assert all(store.readable(0, part)[0] is (hole if part is early else good) for part in order)
            assert store.n_failed == 2
    assert "left out" in caplog.text and "cut.flac" in caplog.text and "hole.flac" in caplog.text


def test_one_sample_that_is_not_finite_and_silence_from_end_to_end_leave_the_whole_out(tmp_path):
    samples = np.concatenate([np.zeros(3 * 16000, np.float32), speechlike(2, 16000)])
    half_silent = write(tmp_path / "half.wav", samples, 16000, "PCM_16")
    assert not Recording(half_silent, 16000).piece(0, 16000).any()  # a pause is speech's
    with pytest.raises(AudioError, match="silent.wav: silent"):
        Recording(write(tmp_path / "silent.wav", 0 * samples, 16000, "PCM_16"), 16000).piece(0, 16000)
    samples[70000] = np.nan
    with pytest.raises(AudioError, match="nan.wav: holds NaN"):
        Recording(write(tmp_path / "nan.wav", samples, 16000, "FLOAT"), 16000)


def test_crops_are_those_of_whole_recordings_with_a_bad_one_among_them(tmp_path):
    good = [write(tmp_path / f"{i}.flac", speechlike(1 + i, 16000, i), 16000, "PCM_16") for i in range(3)]
    bad = write(tmp_path / "bad.wav", np.zeros(16000, np.float32), 16000, "PCM_16")
    utterances = [good[0], bad, *good[1:]]
    audio = TrainingAudio([AudioStore(utterances, 24000)], [1.0], 24000, seed=5)
    crops = TrainingCrops(audio, CropConfig(crop_s=1.5), AugmentationConfig(), 8, length=12, seed=5)
    for position in range(12):
        index = epoch_item(position, 4, 5)
        utterance = utterances[index] if index != 1 else good[1]
        assert crops.utterance(position) is utterance
        expected = drawn(crops, load_audio(utterance, 24000), position)
        assert np.abs(crops[position]["input_values"][0].numpy() - expected).max() <= 1e-5


def test_too_long_a_recording_is_refused_before_it_is_decoded(tmp_path, frames_read):
    utterance = write(tmp_path / "long.flac", speechlike(30, 16000), 16000, "PCM_16")
    with pytest.raises(AudioError, match="30.0 s, more than max_duration_s=2"):
        load_audio(utterance, 16000, max_duration_s=2)
    assert sum(frames_read) <= 2 * 16000 + 1
    assert len(load_audio(utterance, 16000, max_duration_s=30)) == 30 * 16000


def test_bytes_and_files_give_the_same_pieces(tmp_path):
    utterance = write(tmp_path / "a.flac", speechlike(3, 16000), 16000, "PCM_16")
    held = Utterance("held", io.FileIO(utterance.audio).readall())
    assert np.array_equal(Recording(held, 24000).piece(999, 9999), Recording(utterance, 24000).piece(999, 9999))
