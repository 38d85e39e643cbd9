"""What loaders send to their workers reaches processes that share nothing with them, and gives the same there.

Workers are spawned by default on macOS and Windows, and from Python 3.14 on (forkserver) on Linux.
"""

from __future__ import annotations

import io

import pytest
import soundfile
import torch
from conftest import tone
from slm_tiny import CODES, tiny_tokenizer, tokens_of, utterances
from torch.utils.data import DataLoader

from slm.training.batches import PackedBatches
from slm.training.samples import NoiseConfig, SpeechSamples
from slm.training.train import _only
from slm.vocabulary import add_speech
from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.data.crops import CropConfig, StepBatches, TrainingCrops
from tokenizer.data.mixing import training_audio
from tokenizer.data.utterances import DataSource
from tokenizer.teacher.recogniser_training import RecogniserCollator, TrainingUtterances
from tokenizer.teacher.whisper import WhisperLogMel


@pytest.fixture
def table(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = []
    for number in range(5):
        wav = io.BytesIO()
        soundfile.write(wav, tone(0.3 + 0.05 * number), 16000, format="WAV")
        audio = {"bytes": wav.getvalue(), "path": None}
        rows.append({"id": f"row{number}", "text": "one two", "audio": audio, "split": "train"})
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "table.parquet"))
    return str(tmp_path / "table.parquet")


def crops_of_a_stream_and_a_list(table, manifest):
    """A stream has read on before the workers start, as in a run that resumes or measures its teacher first."""
    sources = [
        DataSource(table, stream=True, weight=1.0, shuffle_buffer=2),
        DataSource(manifest, weight=1.0),
        DataSource(table, weight=1.0),
    ]
    audio = training_audio(sources, 16000, seed=0, needs_text=False)
    crops = TrainingCrops(audio, CropConfig(crop_s=0.3), AugmentationConfig(), 4, 24, seed=0)
    assert len(crops[0]) == len(crops[1]) == 4
    return crops, {"batch_sampler": StepBatches(audio, range(3), 8, 2, 0, 1)}


def recordings_of_a_teacher(table, manifest):
    audio = training_audio([DataSource(table), DataSource(manifest)], 16000, seed=0)
    texts = {utterance.id: "one two" for utterance in audio.parts[0].utterances}
    recordings = TrainingUtterances(audio, texts, AugmentationConfig(), 8, window_s=1.0, seed=0)
    return recordings, {"batch_size": 4, "collate_fn": RecogniserCollator(WhisperLogMel(80), 16000)}


def packed_batches(table, manifest):
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES, CODES])
    tokens = tokens_of(vocabulary, tokenizer, utterances())
    samples = SpeechSamples(vocabulary, tokens, {"asr": 1.0, "tts": 1.0}, NoiseConfig())
    batches = PackedBatches(samples, steps=2, tokens_per_step=200, micro_batches=2, pack_length=64, seed=0)
    return batches, {"batch_size": 1, "collate_fn": _only}


@pytest.mark.parametrize("made_by", [crops_of_a_stream_and_a_list, recordings_of_a_teacher, packed_batches])
def test_spawned_workers_give_what_the_process_itself_gives(table, make_corpus, made_by):
    data, settings = made_by(table, str(make_corpus()))
    here = list(DataLoader(data, **settings))
    there = list(DataLoader(data, **settings, num_workers=2, multiprocessing_context="spawn"))
    assert len(here) == len(there) > 1
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
