"""The frozen teacher: Whisper's front end to 1e-4, any crop length, gradient to the waveform and to nothing else."""

from __future__ import annotations

import julius
import pytest
import torch
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from tokenizer.teacher import whisper as teacher_module
from tokenizer.teacher.distillation import resynthesis_distillation
from tokenizer.teacher.whisper import (
    SpeechTeacher,
    TeacherConfig,
    WhisperLogMel,
    at_teacher_rate,
    encoder_window,
    teacher_width,
)


def tiny_whisper(positions: int = 100) -> WhisperModel:
    torch.manual_seed(0)
    return WhisperModel(
        WhisperConfig(
            vocab_size=40, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=positions,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ).eval()  # fmt: skip


def speech_like(seconds: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(round(16000 * seconds), generator=generator)
    return 0.1 * noise * torch.sin(torch.linspace(0, 20, len(noise)))


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_equals_whisper_feature_extractor(n_mels):
    extractor = WhisperFeatureExtractor(feature_size=n_mels, chunk_length=3)
    waveforms = [speech_like(3.0), 0.01 * speech_like(1.7, seed=1)]
    wanted = extractor([w.numpy() for w in waveforms], sampling_rate=16000, return_tensors="pt").input_features
    batch = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    assert (WhisperLogMel(n_mels)(batch) - wanted).abs().max() < 1e-4


def test_whole_window_equals_whisper_model():
    """With `pad_to_seconds` the distillation loss equals the one from WhisperFeatureExtractor and WhisperModel."""
    model = tiny_whisper(100)
    teacher = SpeechTeacher(model.encoder, pad_to_seconds=2.0)
    one, other = speech_like(1.2)[None], speech_like(1.2, seed=5)[None]
    extractor = WhisperFeatureExtractor(chunk_length=2)

    def reference(waveform):
        features = extractor(waveform[0].numpy(), sampling_rate=16000, return_tensors="pt").input_features
        return model.encoder(features).last_hidden_state

    wanted = torch.nn.functional.mse_loss(reference(one), reference(other))
    loss, share = resynthesis_distillation(teacher, one, other)
    assert abs(loss - wanted) < 1e-4
    assert torch.isclose(share, wanted / reference(one).var(), atol=1e-4)


def test_a_crop_uses_the_first_positions_and_leaves_the_encoder_as_it_was():
    model = tiny_whisper(100)
    table = model.encoder.embed_positions
    features = torch.randn(1, 80, 60)
    with encoder_window(model.encoder, 60):
        out = model.encoder(features).last_hidden_state
    assert out.shape == (1, 30, 32)
    assert model.encoder.embed_positions is table and model.encoder.config.max_source_positions == 100
    with pytest.raises(ValueError, match="even number up to 200"), encoder_window(model.encoder, 202):
        pass


def test_gradient_reaches_the_resynthesis_and_no_teacher_parameter():
    teacher = SpeechTeacher(tiny_whisper().encoder)
    resynthesis = speech_like(1.0, seed=2)[None].requires_grad_()
    loss, _ = resynthesis_distillation(teacher, speech_like(1.0)[None], resynthesis)
    loss.backward()
    assert resynthesis.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_identical_waveforms_cost_nothing_and_train_mode_is_refused():
    teacher = SpeechTeacher(tiny_whisper().encoder).train()
    assert not any(module.training for module in teacher.modules())
    loss, share = resynthesis_distillation(teacher, speech_like(1.0)[None], speech_like(1.0)[None])
    assert loss == 0 and share == 0


def test_too_long_a_crop_and_unknown_names_are_told():
    teacher = SpeechTeacher(tiny_whisper(100).encoder)
    with pytest.raises(ValueError, match="window is 2 s"):
        teacher(torch.zeros(1, 16000 * 3))
    with pytest.raises(ValueError, match="pad_to_seconds=30"):
        SpeechTeacher(tiny_whisper(100).encoder, pad_to_seconds=30)
    with pytest.raises(ValueError, match="no/such-teacher.*train-teacher"):
        SpeechTeacher.from_pretrained(TeacherConfig(name="no/such-teacher"))
    with pytest.raises(ValueError, match="'whisper-small': no such folder, and a hub name is `owner/name`"):
        SpeechTeacher.from_pretrained(TeacherConfig(name="whisper-small"))
    with pytest.raises(ValueError, match="teacher.name is empty"):
        SpeechTeacher.from_pretrained(TeacherConfig())


def test_a_folder_that_would_give_a_teacher_of_random_weights_is_refused(tmp_path, tiny_tokenizer):
    """transformers loads both without an error: another kind of model, and a Whisper whose encoder is not all there."""
    with pytest.raises(ValueError, match="type 'lmspt', not a Whisper.*train-teacher"):
        SpeechTeacher.from_pretrained(TeacherConfig(str(tiny_tokenizer)))
    with pytest.raises(ValueError, match="not a Whisper"):
        teacher_width(TeacherConfig(str(tiny_tokenizer)))
    whisper = tiny_whisper()
    whisper.save_pretrained(tmp_path)
    loaded = SpeechTeacher.from_pretrained(TeacherConfig(str(tmp_path)))
    assert torch.equal(loaded.encoder.conv1.weight, whisper.encoder.conv1.weight)
    weights = {name: value for name, value in whisper.state_dict().items() if name != "encoder.conv2.weight"}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing, such as encoder.conv2.weight"):
        SpeechTeacher.from_pretrained(TeacherConfig(str(tmp_path)))
    weights["encoder.conv2.weight"] = torch.zeros(1, 2, 3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights do not fit config.json"):
        SpeechTeacher.from_pretrained(TeacherConfig(str(tmp_path)))


def test_odd_lengths_are_padded_to_whole_encoder_frames():
    """With zeros: the same features as of the padded waveform. A frame of the encoder is 320 samples."""
    teacher = SpeechTeacher(tiny_whisper().encoder)
    for waveform, frames in ((speech_like(1.0)[None, :15999], 50), (torch.ones(2, 100), 1)):
        padded = torch.nn.functional.pad(waveform, (0, 320 * frames - waveform.shape[1]))
        features = teacher(waveform)
        assert features.shape == (len(waveform), frames, 32)
        torch.testing.assert_close(features, teacher(padded))


def test_the_resamplers_kernel_is_made_once(monkeypatch):
    """Made anew in each step it costs more than the resampling itself: 77 ms in all at 44.1 kHz."""
    made, real = [], julius.ResampleFrac._init_kernels
    monkeypatch.setattr(julius.ResampleFrac, "_init_kernels", lambda self: made.append(self.old_sr) or real(self))
    waves = torch.randn(3, 2, 1, 4410, requires_grad=True)
    wanted = [julius.resample_frac(wave[:, 0], 44100, 16000) for wave in waves]
    made.clear()
    teacher_module._resampler.cache_clear()
    with torch.inference_mode():  # a validation that comes first leaves a kernel to learn with
        assert torch.equal(at_teacher_rate(waves[0].detach(), 44100), wanted[0])
    assert all(torch.equal(at_teacher_rate(wave, 44100), want) for wave, want in zip(waves, wanted, strict=True))
    at_teacher_rate(waves[0], 44100).sum().backward()
    assert len(made) == 1


def test_other_rates_are_resampled_inside_the_graph_and_the_longer_is_cut():
    time_s = torch.arange(24000) / 24000
    wave = torch.sin(2 * torch.pi * 300 * time_s)[None, None].requires_grad_()
    heard = at_teacher_rate(wave, 24000)
    assert heard.shape == (1, 16000)
    wanted = torch.sin(2 * torch.pi * 300 * torch.arange(16000) / 16000)
    assert (heard[0, 500:-500] - wanted[500:-500]).abs().max() < 1e-2
    heard.sum().backward()
    assert wave.grad is not None
    teacher = SpeechTeacher(tiny_whisper().encoder)
    loss, _ = resynthesis_distillation(
        teacher, speech_like(1.0)[None], torch.cat([speech_like(1.0), torch.ones(400)])[None]
    )
    assert loss == 0
