"""What the teacher teaches: pooled features, nothing, the probe; which parameters each of them moves."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_codec_training import config, metrics

from recipes.commands import train_tokenizer
from recipes.config import ConfigError, from_values, load_config
from recipes.runs.run_folder import RunFolder
from recipes.tokenizer_training.networks import new_state
from recipes.tokenizer_training.objective import distillation_weights, make_objective
from tokenizer.model.configuration import preset_config
from tokenizer.model.modeling import LMSPTOutput
from tokenizer.teacher.default_weight import default_weight, target_variances
from tokenizer.teacher.distillation import (
    DistillationConfig,
    distillation_losses,
    normalized_mse,
    pool_to_frames,
    pooled_distillation,
    resynthesis_distillation,
    signal_variance,
)
from tokenizer.training.objective import codec_losses, loss_weights
from tokenizer.training.step import train_step
from tokenizer.training.validation import validate


def cell(manifest, run_dir, teacher, kind, probe=False, **changes):
    changes.setdefault("discriminator", {"enabled": False})
    return config(manifest, run_dir, teacher, distillation={"kind": kind, "probe": probe}, **changes)


def one_step(settings):
    """Which parts a training step moves, the parameters after it, its metrics, and the state."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    state = new_state(settings, accelerator)
    objective = make_objective(settings, accelerator)
    objective.distillation_weight, objective.probe_weight = 3.0, 3.0
    batch = {
        "input_values": 0.1 * torch.randn(2, 1, 8000),
        "padding_mask": torch.arange(8000) < torch.tensor([[8000], [5000]]),
        "n_acoustic_books": torch.tensor([2, 1]),
        "semantic_only": torch.tensor([False, True]),
    }
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    heard = {name: p.detach().clone() for name, p in objective.teacher.named_parameters()} if objective.teacher else {}
    state.model.train()
    figures = train_step(state, [batch], objective, settings.training, accelerator)
    for name, parameter in heard.items():
        assert torch.equal(parameter, objective.teacher.get_parameter(name)), f"the teacher moved: {name}"
    after = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    return moved, after, figures, state


ALL = {"semantic_encoder", "acoustic_encoder", "quantizer", "decoder", "auxiliary_decoder"}


@pytest.mark.parametrize("probe", [False, True])
@pytest.mark.parametrize("kind", ["pooled", "none"])
def test_the_probe_moves_the_auxiliary_decoder_and_nothing_else(tmp_path, tiny_teacher, kind, probe):
    settings = cell("", tmp_path / "run", tiny_teacher, kind, probe)
    moved, after, figures, _ = one_step(settings)
    assert moved == (ALL if probe else ALL - {"auxiliary_decoder"})
    assert ("loss/probe" in figures) == probe and ("loss/distillation" in figures) == (kind == "pooled")
    if probe:
        # not even by way of the clipped gradient norm: all else is bit-equal to the run without it
        settings = cell("", tmp_path / "run", tiny_teacher, kind, False)
        _, without, _, _ = one_step(settings)
        others = [name for name in after if not name.startswith("auxiliary_decoder.")]
        assert all(torch.equal(after[name], without[name]) for name in others)


def test_each_kind_reaches_the_semantic_encoder_by_its_own_way(tmp_path, tiny_teacher):
    """Gradient of the distillation terms alone."""
    reached = {}
    for kind, probe in (("resynthesis", False), ("pooled", False), ("none", True)):
        settings = cell("", tmp_path / "run", tiny_teacher, kind, probe)
        accelerator = Accelerator(cpu=True)
        state = new_state(settings, accelerator)
        objective = make_objective(settings, accelerator)
        values = torch.randn(2, 1, 8000)
        output = state.model(values, auxiliary=settings.distillation.auxiliary)
        terms = distillation_losses(
            settings.distillation, objective.teacher, state.projection, output, values, state.model.config
        )
        sum(terms.values()).backward()
        reached[kind] = {
            name.split(".")[0] for name, p in state.model.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert all(p.grad is None for p in objective.teacher.parameters())
        if kind == "pooled":
            assert output.auxiliary_values is None
            assert all(p.grad.any() for p in state.projection.parameters())
    assert reached == {
        "resynthesis": {"semantic_encoder", "quantizer", "auxiliary_decoder"},
        "pooled": {"semantic_encoder", "quantizer"},
        "none": {"auxiliary_decoder"},
    }


@pytest.mark.parametrize("name", ["semantic_reconstruction", "reconstruction"])
def test_the_teacher_hears_what_the_main_decoder_makes(tmp_path, tiny_teacher, name):
    """Of book 0, or of more books, each in items of its own; it counts an item once whatever micro-batch it is in."""
    settings = cell("", tmp_path / "run", tiny_teacher, "resynthesis", False)
    setattr(settings.distillation, name, 0.5)
    accelerator = Accelerator(cpu=True)
    state = new_state(settings, accelerator)
    objective = make_objective(settings, accelerator)
    objective.distillation_weight = 8.0
    assert loss_weights(objective)[name] == 4.0
    values, semantic_only = torch.randn(4, 1, 8000), torch.tensor([True, False, False, True])
    of_book_0 = name == "semantic_reconstruction"

    def term(items: slice) -> torch.Tensor:
        output = state.model(values[items], semantic_only=semantic_only[items])
        found = codec_losses(objective, output, values[items], state.model.config, None, None, semantic_only[items])
        assert {"semantic_reconstruction", "reconstruction"} & set(found) == {name}
        return found[name]

    whole = term(slice(0, 4))
    whole.backward()
    moved = {part.split(".")[0] for part, p in state.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == ({"decoder"} if of_book_0 else {"decoder", "acoustic_encoder", "quantizer", "semantic_encoder"})
    assert all(p.grad is None for p in objective.teacher.parameters())
    halves = torch.stack([term(slice(0, 2)), term(slice(2, 4))])
    torch.testing.assert_close(halves.mean(), whole, rtol=1e-4, atol=1e-6)
    assert (float(term(slice(1, 3)).detach()) == 0.0) == of_book_0
    with pytest.raises(ValueError, match=f"{name} goes with kind=resynthesis"):
        DistillationConfig("pooled", **{name: 1.0})


def test_the_teacher_may_hear_the_main_decoder_alone(tmp_path, tiny_teacher):
    """With kind=none the auxiliary decoder is not run; what is heard counts what it does beside resynthesis."""
    weights = {}
    for kind in ("resynthesis", "none"):
        settings = cell("", tmp_path / kind, tiny_teacher, kind, False)
        settings.distillation.reconstruction = 0.5
        state = new_state(settings, Accelerator(cpu=True))
        objective = make_objective(settings, Accelerator(cpu=True))
        crops = [{"input_values": torch.ones(1, 8000).sin(), "padding_mask": torch.ones(8000, dtype=torch.bool)}] * 2
        crops[0]["input_values"] = torch.linspace(0, 900, 8000).sin()[None]
        folder = RunFolder(tmp_path / kind)
        folder.path().mkdir()
        weights[kind] = distillation_weights(settings, state.model_config, crops, objective.teacher, folder)[0]
    assert weights["none"] == weights["resynthesis"] > 0
    values = torch.randn(2, 1, 8000)
    output = state.model(values, auxiliary=settings.distillation.auxiliary)
    found = codec_losses(objective, output, values, state.model.config, None)
    assert output.auxiliary_values is None and found["reconstruction"] > 0 and "distillation" not in found


def test_the_teacher_hears_a_reconstruction_of_all_books(tmp_path, tiny_teacher):
    """Its loss is the mean square error of the two encodings, of a batch without items of book 0 alone too."""
    settings = cell("", tmp_path / "run", tiny_teacher, "resynthesis", False)
    settings.distillation.reconstruction = 1.0
    accelerator = Accelerator(cpu=True)
    state = new_state(settings, accelerator)
    objective = make_objective(settings, accelerator)
    values = torch.randn(2, 1, 8000)
    output = state.model(values)
    found = codec_losses(objective, output, values, state.model.config, None)["reconstruction"]
    encodings = [objective.teacher(waveforms[:, 0, :8000]).float() for waveforms in (output.audio_values, values)]
    torch.testing.assert_close(found, (encodings[0] - encodings[1]).square().mean())


def test_semantic_reconstruction_needs_items_of_book_0_alone() -> None:
    """Without any the loss would be 0 at every step, and the key a claim."""
    with pytest.raises(ConfigError, match="semantic_reconstruction.*crops.semantic_only"):
        load_config(train_tokenizer.Config, "published/12.5hz", ["distillation.semantic_reconstruction=1.0"])


def test_pooling_is_the_mean_over_each_code_frame():
    features = torch.randn(2, 100, 3)
    pooled = pool_to_frames(features, 13, preset_config("nano-6.25hz"))
    torch.testing.assert_close(pooled[:, :12], features[:, :96].unfold(1, 8, 8).mean(-1))
    torch.testing.assert_close(pooled[:, 12], features[:, 96:].mean(1))  # half a frame, averaged over that half


def test_pooling_is_exact_at_a_ratio_that_is_not_whole():
    sizes = preset_config("nano-12.5hz", sampling_rate=24000, strides=[160, 4, 3], auxiliary_strides=[160, 4, 2])
    assert sizes.frame_rate == 12.5
    odd = preset_config("nano-12.5hz", strides=[160, 3, 2])  # 16.67 Hz: three teacher frames each
    rare = preset_config("nano-12.5hz", strides=[128, 5, 2], n_fft=640)  # 12.5 Hz
    uneven = preset_config("nano-12.5hz", strides=[160, 7, 1])  # 14.29 Hz: 3.5 teacher frames each
    features = torch.arange(28.0)[None, :, None]
    torch.testing.assert_close(pool_to_frames(features, 7, sizes), pool_to_frames(features, 7, rare))
    torch.testing.assert_close(pool_to_frames(features, 9, odd)[0, :, 0], torch.arange(9.0) * 3 + 1)
    expected = [(0 + 1 + 2 + 0.5 * 3) / 3.5, (0.5 * 3 + 4 + 5 + 6) / 3.5]
    torch.testing.assert_close(pool_to_frames(features, 8, uneven)[0, :2, 0], torch.tensor(expected))
    fast = preset_config("nano-25hz", strides=[160, 1])  # 100 Hz: each teacher frame twice
    torch.testing.assert_close(pool_to_frames(features, 56, fast)[0, :, 0], torch.arange(28.0).repeat_interleave(2))
    # a last code frame that begins where the features end takes the nearest
    torch.testing.assert_close(pool_to_frames(features, 57, fast)[0, -1, 0], torch.tensor(27.0))


def test_pooled_loss_leaves_out_what_lies_past_the_mask():
    predicted, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    loss, share = pooled_distillation(predicted, target, mask)
    parts = [(predicted[0] - target[0]).square().mean(), (predicted[1, :2] - target[1, :2]).square().mean()]
    torch.testing.assert_close(loss, sum(parts) / 2)
    predicted_frames, frames = (torch.cat([values[0], values[1, :2]]) for values in (predicted, target))
    variance = frames.var(dim=0, correction=0).mean()
    torch.testing.assert_close(share, (predicted_frames - frames).square().mean() / variance)
    junk_p, junk_t = predicted.clone(), target.clone()
    junk_p[1, 2:], junk_t[1, 2:] = 1e3, -1e3
    assert torch.equal(pooled_distillation(junk_p, junk_t, mask)[1], share)


def test_the_mean_of_each_channel_loses_the_whole_signal_and_padding_changes_nothing():
    """Offsets of whole channels are no signal: around one mean for all of them the same guess scored 0.002."""
    torch.manual_seed(0)
    target = torch.randn(2, 50, 8) + 20 * torch.randn(8)
    guess = target.mean(dim=(0, 1)).expand_as(target)
    assert normalized_mse(guess, target) == pytest.approx(1, abs=1e-4)
    assert pooled_distillation(guess, target, None)[1] == pytest.approx(1, abs=1e-4)
    assert normalized_mse(0.5 * (guess + target), target) == pytest.approx(0.25, abs=1e-4)

    def padded(values, with_what):
        return torch.cat([values, torch.full((2, 70, 8), with_what)], dim=1)

    mask = torch.arange(120).expand(2, -1) < 50
    near = target + 0.1 * torch.randn(2, 50, 8)
    wanted = normalized_mse(near, target)
    torch.testing.assert_close(normalized_mse(padded(near, 3.0), padded(target, 5.0), mask), wanted)
    torch.testing.assert_close(signal_variance(padded(target, 5.0), mask), target.var((0, 1), correction=0).mean())


class Heard(torch.nn.Module):
    """A teacher of 50 frames a second that hears each frame's samples alone, and pads its window."""

    def __init__(self, window_s: float) -> None:
        super().__init__()
        self.frames = round(50 * window_s)
        self.weight = torch.nn.Parameter(torch.randn(320, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, waveform):
        padded = torch.nn.functional.pad(waveform, (0, 320 * self.frames - waveform.shape[-1]))
        return padded.unflatten(-1, (self.frames, 320)) @ self.weight + 3.0


@pytest.mark.parametrize("kind", ["resynthesis", "pooled"])
def test_neither_a_window_nor_a_short_recording_dilutes_the_share_or_the_default_weight(kind):
    torch.manual_seed(1)
    sizes, lengths = preset_config("nano-12.5hz"), (15360, 6400)  # whole code frames
    waveforms = [0.1 * torch.randn(n) for n in lengths]
    batch = torch.zeros(2, 1, 15360)
    for row, waveform in zip(batch, waveforms, strict=True):
        row[0, : len(waveform)] = waveform
    mask = torch.arange(12) * sizes.hop_length < torch.tensor(lengths)[:, None]
    frames = torch.cat([Heard(n / 16000)(w[None])[0] for n, w in zip(lengths, waveforms, strict=True)])
    variance = frames.var(dim=0, correction=0).mean()
    settings, silence = DistillationConfig(kind), torch.zeros(2, 1, 15360)
    output = LMSPTOutput(auxiliary_values=silence, quantized_semantic=torch.zeros(2, 4, 12), audio_codes_mask=mask)
    shares = []
    for window_s in (0.96, 4.0):
        teacher = Heard(window_s).requires_grad_(False)
        losses = distillation_losses(settings, teacher, lambda _: torch.full((2, 12, 8), 3.0), output, batch, sizes)
        shares.append(losses["distillation_share"])
        crops = [{"input_values": crop, "padding_mask": crop[0] != 0} for crop in batch]
        found = target_variances(crops, teacher, sizes, pooled=True)
        assert found["variance"] == pytest.approx(float(variance), rel=1e-4)
    torch.testing.assert_close(*shares)
    if kind == "resynthesis":  # silence is what each channel's offset says
        torch.testing.assert_close(shares[0], (frames - 3).square().mean() / variance)


def test_the_default_weight_makes_up_for_variance_and_padding():
    variances = {"variance": 4.0, "pooled_variance": 2.0}
    assert default_weight("resynthesis", variances, 1.0) == default_weight("probe", variances, 1.0, 0.5) == 25.0
    assert default_weight("resynthesis", variances, 2.0, 30.0) == 15 * 25.0
    assert default_weight("pooled", variances, 2.0, 30.0) == 50.0


def test_the_default_is_resynthesis_to_the_last_bit(tmp_path, tiny_teacher):
    assert from_values(train_tokenizer.Config, {}).distillation == DistillationConfig("resynthesis", False)
    settings = config("", tmp_path / "run", tiny_teacher)
    accelerator = Accelerator(cpu=True)
    model = new_state(settings, accelerator).model
    heard_by = make_objective(settings, accelerator).teacher
    values = torch.randn(2, 1, 8000)
    output = model(values)
    found = distillation_losses(DistillationConfig(), heard_by, None, output, values, model.config)
    wanted = resynthesis_distillation(heard_by, values[:, 0], output.auxiliary_values[:, 0])
    assert torch.equal(found["distillation"], wanted[0]) and torch.equal(found["distillation_share"], wanted[1])


def test_a_pooled_run_with_probe_resumes_exactly_and_logs_both_shares(make_corpus, tmp_path, tiny_teacher, monkeypatch):
    manifest = make_corpus()
    make_corpus(2, split="valid")
    whole = train_tokenizer.run(cell(manifest, tmp_path / "whole", tiny_teacher, "pooled", probe=True))
    settings = cell(manifest, tmp_path / "cut", tiny_teacher, "pooled", probe=True)
    import tokenizer.training.loop as training

    real, calls = training.train_step, []

    def cut_off(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "train_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer.run(settings)
    assert not (tmp_path / "cut/model").exists()
    resumed = train_tokenizer.run(settings)
    one, other = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one) and not any("projection" in name for name in one)
    last = "checkpoints/checkpoint-0000004/projection.safetensors"
    one, other = load_file(tmp_path / "whole" / last), load_file(tmp_path / "cut" / last)
    assert one and all(torch.equal(one[name], other[name]) for name in one)
    rows = metrics(tmp_path / "cut")
    assert all(row["loss/distillation_share"] > 0 and row["loss/probe_share"] > 0 for row in rows if "loss/mel" in row)
    (scores,) = [row for row in rows if "valid/mel" in row]
    assert scores["valid/distillation_share"] > 0 and scores["valid/probe_share"] > 0
    variances = json.loads((tmp_path / "cut/teacher_variance.json").read_text())
    record = json.loads((tmp_path / "cut/complete.json").read_text())["summary"]
    assert record["distillation_weight"] == pytest.approx(100 / variances["pooled_variance"])
    assert record["probe_weight"] == pytest.approx(100 / variances["variance"])


def test_validation_without_distillation_hears_no_teacher(make_corpus, tmp_path):
    settings = cell(make_corpus(), tmp_path / "run", "no/such-teacher", "none")
    _, _, figures, state = one_step(settings)
    objective = make_objective(settings, Accelerator(cpu=True))
    assert objective.teacher is None and "loss/distillation" not in figures
    assert "valid/distillation_share" not in validate(state.model, [torch.randn(2, 1, 8000)], objective)
    assert train_tokenizer.plan(settings)["teacher"] == "none is heard"


@pytest.mark.parametrize(("kind", "probe"), [("resynthesis", False), ("pooled", False), ("none", True)])
def test_what_needs_a_teacher_says_so(make_corpus, tmp_path, kind, probe):
    settings = cell(make_corpus(), tmp_path / "run", None, kind, probe)
    for entry in (train_tokenizer.plan, train_tokenizer.run):
        with pytest.raises(ConfigError, match=f"distillation.kind={kind}.*needs a teacher.*distillation.kind=none"):
            entry(settings)
