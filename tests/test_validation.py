"""The validation of a tokenizer training: whom it hears, and that no score is of silence or of a chunk's size."""

from __future__ import annotations

import json
import logging

import pytest
import soundfile
import torch
from conftest import tone
from test_codec_training import TINY

from tokenizer import LMSPTModel
from tokenizer.data.crops import validation_crops
from tokenizer.data.mixing import validation_utterances
from tokenizer.data.utterances import AudioError, DataError, DataSource
from tokenizer.model.configuration import preset_config
from tokenizer.teacher.distillation import DistillationConfig, resynthesis_distillation
from tokenizer.teacher.whisper import SpeechTeacher
from tokenizer.training.losses import LossWeights, MultiScaleMelLoss
from tokenizer.training.objective import Objective
from tokenizer.training.validation import validate

PUBLISHED = {
    "semantic_encoder_width": 2, "acoustic_encoder_width": 2, "latent_dim": 16, "decoder_width": 64,
    "auxiliary_decoder_width": 16, "codebook_sizes": [32, 16, 16],
}  # fmt: skip


def corpus(folder, n: int, split: str = "valid", seconds: float = 0.3) -> DataSource:
    """A manifest of recordings that are told apart by their pitch; their ids begin with the folder's name."""
    folder.mkdir()
    rows = []
    for number in range(n):
        soundfile.write(folder / f"{number}.wav", tone(seconds, pitch_hz=150 + 20 * number), 16000)
        rows.append({"id": f"{folder.name}{number}", "audio": f"{number}.wav", "split": split})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(str(folder))


def objective_of(model, teacher=None):
    mel = MultiScaleMelLoss(model.config.sampling_rate, windows=(256,), n_mels=(20,))
    return Objective(LossWeights(), mel, teacher, distillation_weight=1.0)


def test_every_source_is_heard_in_turn_and_what_cannot_be_read_is_made_up_for(tmp_path, caplog):
    many, few, none = corpus(tmp_path / "many", 40), corpus(tmp_path / "few", 2), corpus(tmp_path / "no", 3, "train")
    (tmp_path / "few/0.wav").write_bytes(b"no audio")
    found = validation_utterances([many, few, none], limit=6)
    assert [path for path, _ in found] == [many.path, few.path]
    ids = [utterance.id for utterance in found[0][1]]
    assert sorted(ids) == sorted(f"many{n}" for n in range(40)) and max(int(i[4:]) for i in ids[:6]) > 10  # spread
    assert found == validation_utterances([many, few, none], limit=6)
    with caplog.at_level(logging.INFO):
        batches = validation_crops(found, 16000, 0.2, limit=6)
    assert [batch.shape for batch in batches] == [(6, 1, 3200)]
    assert f"validation crops: 5 of {many.path}, 1 of {few.path}" in caplog.text and "left out" in caplog.text
    with pytest.raises(DataError, match="no utterances in split 'valid'"):
        validation_utterances([none], limit=6)
    with pytest.raises(AudioError, match="none of the valid recordings"):
        validation_crops([("few", [u for u in found[1][1] if u.id == "few0"])], 16000, 0.2, limit=6)


def test_short_recordings_are_not_padded_and_those_without_a_frame_passed_over(tmp_path):
    short, long = corpus(tmp_path / "short", 2, seconds=0.15), corpus(tmp_path / "long", 20, seconds=0.4)
    found = validation_utterances([short, long], limit=40)
    assert [batch.shape for batch in validation_crops(found, 16000, 0.25, 40)] == [
        (2, 1, 2400), (16, 1, 4000), (4, 1, 4000)
    ]  # fmt: skip
    assert sum(len(batch) for batch in validation_crops(found, 16000, 0.25, 40, min_samples=3000)) == 20


def test_scores_are_means_over_crops_whatever_their_length_and_batch():
    torch.manual_seed(0)
    model = LMSPTModel(preset_config("nano-12.5hz", **TINY))
    from test_teacher import tiny_whisper

    objective = objective_of(model, SpeechTeacher(tiny_whisper().encoder))
    loud, quiet = 0.3 * torch.randn(16, 1, 8000), 0.01 * torch.randn(1, 1, 3000)
    apart = [validate(model, [batch], objective) for batch in (loud, quiet)]
    both = validate(model, [loud, quiet], objective)
    for name in ("valid/mel", "valid/mel_semantic", "valid/distillation_share"):
        assert both[name] == pytest.approx((16 * apart[0][name] + apart[1][name]) / 17, rel=1e-5), name
    assert abs(apart[0]["valid/mel"] - apart[1]["valid/mel"]) > 0.1  # else the weights would not show


def test_what_the_teacher_hears_of_reconstructions_is_scored_where_it_is_trained():
    """All books and book 0 alone, each by its own share; neither where its key has no weight."""
    torch.manual_seed(0)
    model = LMSPTModel(preset_config("nano-12.5hz", **TINY)).eval()
    from test_teacher import tiny_whisper

    objective = objective_of(model, SpeechTeacher(tiny_whisper().encoder))
    crops = 0.3 * torch.randn(2, 1, 8960)
    codes = model.encode(crops).audio_codes
    for name, heard in (("reconstruction", codes), ("semantic_reconstruction", codes[:, :1])):
        objective.distillation = DistillationConfig("none", **{name: 1.0})
        scores = {key: value for key, value in validate(model, [crops], objective).items() if key.endswith("_share")}
        made = model.decode(heard).audio_values[..., :8960]
        wanted = resynthesis_distillation(objective.teacher, crops[:, 0], made[:, 0])[1]
        assert scores == {f"valid/{name}_share": pytest.approx(float(wanted), rel=1e-4)}


def test_validation_twice_is_equal_and_moves_nothing():
    """Neither dropout of books nor the use of entries, which both belong to training, nor a random stream."""
    torch.manual_seed(0)
    model = LMSPTModel(preset_config("nano-12.5hz", **TINY)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    crops, stream = [0.3 * torch.randn(3, 1, 8000)], torch.get_rng_state()
    first, second = (validate(model, crops, objective_of(model)) for _ in range(2))
    assert first == second and torch.equal(stream, torch.get_rng_state()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("crop_s", [0.25, 0.3])
def test_crops_that_are_not_whole_frames_are_scored_without_exact_lengths(crop_s):
    """The published models: the convolutions give fewer frames than the crop would fill."""
    torch.manual_seed(0)
    model = LMSPTModel(preset_config("release-12.5hz", **PUBLISHED))
    samples = round(24_000 * crop_s)
    assert samples % model.config.hop_length
    crops, objective = 0.1 * torch.randn(2, 1, samples), objective_of(model)
    scores = validate(model, [crops], objective)
    codes = model.eval().encode(crops).audio_codes
    for name, heard in (("valid/mel", codes), ("valid/mel_semantic", codes[:, :1])):
        made = model.decode(heard).audio_values
        missing = max(0, samples - made.shape[-1])  # counts as silence
        made = torch.cat([made, torch.zeros(2, 1, missing)], dim=-1)[..., :samples]
        assert scores[name] == pytest.approx(objective.mel(made, crops).item(), rel=1e-5)
