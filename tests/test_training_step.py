"""The fast training step against the published one: the same losses, the same gradients, each saving apart."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_teacher import tiny_whisper
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.models.dac.modeling_dac import Snake1d

from tokenizer import LMSPTModel
from tokenizer.codecs.published import load_published
from tokenizer.model.configuration import preset_config
from tokenizer.model.cpu_kernels import mean_absolute_difference
from tokenizer.model.dac import Snake
from tokenizer.teacher.whisper import SpeechTeacher, at_teacher_rate
from tokenizer.training.discriminator import Conv, Discriminator, DiscriminatorConfig, channels_last
from tokenizer.training.losses import LossWeights, MultiScaleMelLoss, discriminator_loss
from tokenizer.training.objective import Objective, codec_losses, loss_weights, split_real_and_generated
from tokenizer.training.stft import magnitudes, stft, stft_by_hops

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT.parent / "shared" / "parity" / "lmspt_tiny"
SMALL = DiscriminatorConfig(periods=[2, 3], fft_sizes=[512, 256], period_channels=2, band_channels=3)


def load(name):
    """A module of the benchmarks' folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


baseline = load("baseline_step")


@pytest.fixture(scope="module")
def teacher():
    """A window of 30 s, and weights that tell one sound from another."""
    encoder = tiny_whisper(1500).encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(20 if parameter.ndim > 1 else 1)
    return SpeechTeacher(encoder, pad_to_seconds=30)


def published_model():
    """The published architecture, small, with Snakes that differ from channel to channel."""
    torch.manual_seed(0)
    sizes = {
        "semantic_encoder_width": 2, "acoustic_encoder_width": 2, "latent_dim": 16, "decoder_width": 64,
        "auxiliary_decoder_width": 16, "codebook_sizes": [32, 16, 16],
    }  # fmt: skip
    model = LMSPTModel(preset_config("release-12.5hz", **sizes)).train()
    for module in model.modules():
        if isinstance(module, Snake1d):
            module.alpha.data.uniform_(0.5, 2.0)
    return model


def sounds(rate=24_000, seconds=0.4, batch=2):
    time_s = torch.arange(round(rate * seconds)) / rate
    pitches = torch.tensor([150.0, 220.0])[:batch, None]
    noise = torch.randn(batch, len(time_s), generator=torch.Generator().manual_seed(0))
    return (0.3 * torch.sin(2 * torch.pi * pitches * time_s) + 0.05 * noise)[:, None]


def objective_of(model, teacher):
    mel = MultiScaleMelLoss(model.config.sampling_rate, windows=(256, 512), n_mels=(20, 40))
    return Objective(LossWeights(), mel, teacher, distillation_weight=500.0)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=3e-5, each=1e-2):
    """All tensors together within the tolerance, relative; and each by itself, far more loosely.

    The slope of an L1 loss is a sign: where two values are equal but for rounding it may come out as the other one, and
    shows in a single bias.
    """
    assert ours.keys() == theirs.keys()
    total = sum(value.double().square().sum() for value in theirs.values()).sqrt()
    apart = sum((ours[name] - value).double().square().sum() for name, value in theirs.items()).sqrt()
    assert apart <= tolerance * total, f"{float(apart):.3g} of {float(total):.3g}"
    for name, value in theirs.items():
        bound = each * float(value.norm()) + 1e-7 * float(total)
        assert float((ours[name] - value).norm()) <= bound, name


def mel_by_hand(output, target, size, n_mels, rate=24_000):
    """L1 of magnitudes and of log10 power of mel spectra, frame by frame in numpy, double precision."""
    taper = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    filters = mel_filter_bank(1 + size // 2, n_mels, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    filters = filters[:, filters.sum(0) > 0]
    levels = []
    for waveform in (output, target):
        padded = np.pad(waveform[:, 0].double().numpy(), ((0, 0), (size // 2, size // 2)))
        starts = range(0, padded.shape[1] - size + 1, size // 4)
        power = np.stack([np.abs(np.fft.rfft(padded[:, s : s + size] * taper)) ** 2 for s in starts], 1)
        levels.append(np.sqrt(power + 1e-9) @ filters)
    logs = [np.log10(np.maximum(level, 1e-5) ** 2) for level in levels]
    return sum(np.abs(one - other).mean() for one, other in (levels, logs))


def test_the_baselines_losses_are_the_parity_values(teacher):
    """Stored waveforms of the published model, heard by transformers' own front end in a window of 30 s."""
    if not PARITY.is_dir():
        pytest.skip(f"no parity data at {PARITY}")
    stored, model = load_file(PARITY / "io.safetensors"), load_published(PARITY).train()
    baseline.snakes(model, False)
    target = stored["audio"]
    with torch.no_grad():
        output = model(target)
        decoded = torch.nn.functional.pad(stored["decoded"], (0, target.shape[-1] - stored["decoded"].shape[-1]))
        torch.testing.assert_close(output.audio_values, decoded, atol=1e-4, rtol=0)
        objective, discriminator = objective_of(model, teacher), Discriminator(SMALL)
        losses = baseline.generator_terms(objective, model, discriminator, {"input_values": target}, output)

        extractor = WhisperFeatureExtractor()

        def heard(waveforms):
            features = extractor(list(waveforms.numpy()), sampling_rate=16_000, return_tensors="pt").input_features
            return teacher.encoder(features).last_hidden_state

        original = at_teacher_rate(target, 24_000)
        resynthesis = stored["aux_decoded"][:, 0, : original.shape[-1]]
        resynthesis = torch.nn.functional.pad(resynthesis, (0, original.shape[-1] - resynthesis.shape[-1]))
        wanted = torch.nn.functional.mse_loss(heard(resynthesis), heard(original))
    assert wanted > 0.01 and abs(losses["distillation"] - wanted) < 1e-4
    wanted = sum(mel_by_hand(decoded, target, *sizes) for sizes in ((256, 20), (512, 40)))
    assert wanted > 0.1 and abs(losses["mel"] - wanted) < 1e-4


def test_losses_and_gradients_are_the_baselines(teacher):
    """fp32, a window of 30 s: what the savings change is time alone, on both halves of the step."""
    model, discriminator = published_model(), Discriminator(SMALL)
    objective, batch = objective_of(model, teacher), {"input_values": sounds()}
    weights, found = loss_weights(objective), []
    for ours in (False, True):
        baseline.snakes(model, ours)
        model.zero_grad()
        discriminator.zero_grad()
        output = model(**batch)
        real, fake = batch["input_values"], output.audio_values.detach()
        if ours:
            judged = discriminator_loss(*split_real_and_generated(discriminator(torch.cat([real, fake]))))
        else:
            judged = baseline.discriminator_term(discriminator, real, fake)
        judged.backward()
        moved = gradients(discriminator)
        if ours:
            losses = codec_losses(objective, output, real, model.config, discriminator)
        else:
            losses = baseline.generator_terms(objective, model, discriminator, batch, output)
        losses["total"] = sum(weights[name] * value for name, value in losses.items() if name in weights)
        losses["total"].backward()
        untouched = gradients(discriminator)
        values = {name: float(value.detach()) for name, value in (losses | {"judged": judged}).items()}
        found.append((values, gradients(model), moved))
        if ours:  # the generator's half gives the discriminators nothing
            assert all(torch.equal(untouched[name], moved[name]) for name in moved)
            assert all(p.requires_grad for p in discriminator.parameters())
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-6)
    for theirs, mine in zip(found[0][1:], found[1][1:], strict=True):
        assert_same(mine, theirs)
    assert found[0][0]["feature_matching"] > 0.01 and found[0][0]["distillation"] > 0.01
    assert all(value.abs().sum() > 0 for value in found[0][2].values())


def test_each_saving_keeps_the_arithmetic():
    """One after the other, as the benchmark turns them on; the second step shows what came of the first."""
    found, names = [], list(baseline.ARITHMETIC)
    for number in range(len(names) + 1):
        savings = names[:number]
        model, discriminator = published_model(), Discriminator(SMALL)
        optimizers = tuple(
            torch.optim.AdamW(part.parameters(), 1e-4, fused="optimizer" in savings) for part in (model, discriminator)
        )
        batch, objective = {"input_values": sounds(seconds=0.12, batch=1)}, objective_of(model, None)
        found.append([baseline.step(objective, model, discriminator, optimizers, batch, savings) for _ in range(2)])
    for first, second in found[1:]:
        assert first == pytest.approx(found[0][0], rel=1e-5, abs=1e-5)
        assert second == pytest.approx(found[0][1], rel=2e-4, abs=2e-5)


def test_spectra_are_torchs_and_so_are_their_gradients():
    for samples in (4001, 300, 200):
        x = sounds(seconds=samples / 24_000)[:, 0].requires_grad_()
        window = torch.hann_window(256)
        reference = torch.stft(x, 256, 64, window=window, pad_mode="constant", return_complex=True).transpose(1, 2)
        torch.testing.assert_close(stft(x, window), reference)
        weights = torch.randn(reference.shape, dtype=reference.dtype, generator=torch.Generator().manual_seed(0))
        floored = (torch.view_as_real(reference).square().sum(-1) + 1e-9).sqrt()
        torch.testing.assert_close(magnitudes(x, window), floored)
        for ours, theirs in ((stft(x, window) * weights, reference * weights), (magnitudes(x, window), floored)):
            mine, wanted = (torch.autograd.grad(value.abs().sum(), x, retain_graph=True)[0] for value in (ours, theirs))
            torch.testing.assert_close(mine, wanted, atol=2e-4, rtol=1e-4)


def test_mirrored_spectra_are_torchs_and_so_are_their_gradients():
    """Centred frames over mirrored ends, and the published discriminators' framing: a frame for each hop."""
    window = torch.hann_window(256)
    for samples in (4001, 300, 256):
        x = sounds(seconds=samples / 24_000)[:, 0].requires_grad_()
        centred = torch.stft(x, 256, 64, window=window, pad_mode="reflect", return_complex=True).transpose(1, 2)
        around = torch.nn.functional.pad(x, (96, 96 + -samples % 64), mode="reflect")
        by_hops = torch.stft(around, 256, 64, window=window, center=False, return_complex=True).transpose(1, 2)
        assert by_hops.shape[1] == -(-samples // 64)
        torch.testing.assert_close(stft_by_hops(x, window), by_hops)
        floored = (torch.view_as_real(centred).square().sum(-1) + 1e-9).sqrt()
        torch.testing.assert_close(magnitudes(x, window, "reflect"), floored)
        weights = torch.randn(by_hops.shape, dtype=by_hops.dtype, generator=torch.Generator().manual_seed(0))
        pairs = ((stft_by_hops(x, window) * weights, by_hops * weights), (magnitudes(x, window, "reflect"), floored))
        for ours, theirs in pairs:
            mine, wanted = (torch.autograd.grad(value.abs().sum(), x, retain_graph=True)[0] for value in (ours, theirs))
            torch.testing.assert_close(mine, wanted, atol=2e-4, rtol=1e-4)


def test_mirrored_discriminators_and_mel_loss_are_the_baselines():
    """`padding: reflect` in the fast discriminators and the fast mel loss equals plain torch, and zeros do not."""
    real, fake = sounds(), sounds() + 0.02 * torch.randn(2, 1, 9600, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    zeros = Discriminator(SMALL)
    mirrored = Discriminator(dataclasses.replace(SMALL, padding="reflect"))
    mirrored.load_state_dict(zeros.state_dict())
    for part, plain in zip(mirrored(real), baseline.discriminate(mirrored, real), strict=True):
        for ours, theirs in zip(part[-2:], plain[-2:], strict=True):
            torch.testing.assert_close(ours.flatten().sort()[0], theirs.flatten().sort()[0], atol=1e-5, rtol=1e-4)
    for one, other in zip(mirrored(real), zeros(real), strict=True):
        assert one[-1].shape != other[-1].shape or not torch.equal(one[-1], other[-1])
    losses = []
    for padding in ("reflect", "zeros"):
        mel = MultiScaleMelLoss(24_000, windows=(256, 512), n_mels=(20, 40), padding=padding)
        losses.append(float(mel(fake, real)))
        assert losses[-1] == pytest.approx(float(baseline.mel_loss(mel, fake, real)), rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_snake_and_l1_are_the_plain_ones(precision):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 50, generator=generator).to(precision)
    slope = torch.randn(2, 6, 50, generator=generator).to(precision)
    found = []
    for kind in (Snake1d, Snake):
        module, entry = kind(6), x.clone().requires_grad_()
        module.alpha.data = torch.linspace(0.1, 3, 6).view(1, 6, 1)
        out = module(entry)
        out.backward(slope.to(out.dtype))
        found.append((out.float(), entry.grad.float(), module.alpha.grad))
    for theirs, ours, bound in zip(*found, (1e-2, 2e-2, 1e-1), strict=True):
        bound = 1e-5 if precision == torch.float32 else bound
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)

    made, wanted = x[..., None].clone().requires_grad_(), slope[..., None]
    made.data[0] = wanted[0]  # where both are equal the gradient is zero
    ours, theirs = mean_absolute_difference(made, wanted), torch.nn.functional.l1_loss(made.float(), wanted.float())
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(loss, made)[0] for loss in (ours, theirs)))


def test_wide_discriminators_have_the_baselines_features_and_gradients():
    """From 512 channels on, fp32 weights that learn are laid out otherwise."""
    discriminator = Discriminator(DiscriminatorConfig(periods=[3], fft_sizes=[], period_channels=32))
    waveform, found = sounds(seconds=0.05), []
    for ours in (True, False):
        discriminator.zero_grad()
        features = discriminator(waveform) if ours else baseline.discriminate(discriminator, waveform)
        features[0][-1].square().sum().backward()
        found.append(gradients(discriminator))
        values = [layer.square().mean() for layer in features[0]]
        found.append({str(number): value.detach() for number, value in enumerate(values)})
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


def test_a_frozen_discriminator_is_folded_once_and_learns_again_afterwards():
    discriminator = Discriminator(SMALL)
    waveform = sounds(seconds=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = discriminator(waveform)
        with discriminator.frozen():
            layer = discriminator.parts[0].layers[1]
            assert layer.folded.dtype == torch.bfloat16 and not layer.folded.requires_grad
            found = discriminator(waveform)
        assert layer.folded is None
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(RuntimeError), discriminator.frozen():
        raise RuntimeError
    discriminator(waveform)[0][-1].sum().backward()
    assert layer.folded is None and layer.bias.grad is not None


def test_under_autocast_sound_and_spectra_stay_in_fp32_and_activations_do_not(teacher):
    model, discriminator, waveform = published_model(), Discriminator(SMALL), sounds(seconds=0.2)
    seen = {}

    def note(name):
        return lambda module, inputs, output: seen.update({name: output.dtype})

    model.decoder.model[-2].register_forward_hook(note("snake"))
    discriminator.parts[0].layers[0].register_forward_hook(note("period"))
    discriminator.parts[-1].stacks[0][0].register_forward_hook(note("band"))
    with torch.no_grad():
        wanted = at_teacher_rate(waveform, 24_000)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(at_teacher_rate(waveform, 24_000), wanted)
            assert objective_of(model, None).mel(waveform, 0.5 * waveform).dtype == torch.float32
            assert teacher.log_mel(wanted).dtype == torch.float32
            model(waveform)
            discriminator(waveform)
    assert seen == dict.fromkeys(("snake", "period", "band"), torch.bfloat16)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("steps", [13, 16, 50])
def test_wide_layers_over_an_even_number_of_steps_say_the_same(steps, stride, monkeypatch):
    """In bf16, where a CPU is slow over odd numbers: what is added at the end reaches no output and no gradient."""
    generator = torch.Generator().manual_seed(0)
    layer = Conv(512, 16, (5, 1), (stride, 1), along_time=True)
    x = torch.randn(2, 512, 1, steps, generator=generator).requires_grad_()
    found = []
    for even in (1, 16):
        monkeypatch.setattr("tokenizer.model.cpu_kernels.TIME_MULTIPLE", even)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(channels_last(x))
        y.float().square().sum().backward(inputs=[x, *layer.parameters()])
        found.append([y, x.grad, layer.weight.grad, layer.bias.grad])
        x.grad = layer.weight.grad = layer.bias.grad = None
    assert found[0][0].shape[-1] == (steps - 1) // stride + 1
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=0.02, atol=0.01 * plain.abs().max().item())


def test_the_benchmark_prints_a_row_for_each_saving(monkeypatch):
    benchmark = load("training_step")
    changes = {
        "semantic_encoder_width": 32, "acoustic_encoder_width": 32, "decoder_width": 32, "auxiliary_decoder_width": 32,
        "latent_dim": 32, "head_dim": 16, "codebook_sizes": [32, 16, 16],
    }  # fmt: skip
    whisper = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 16}
    monkeypatch.setattr(benchmark, "DiscriminatorConfig", lambda **_: SMALL)
    monkeypatch.setattr(benchmark, "WINDOW_S", 1.0)
    size = benchmark.Size("nano-12.5hz", changes, 1, 0.25, 2, 3, "zeros", whisper)
    options = SimpleNamespace(rounds=1, busy=True, dropped=True, threads=1, rows=None)
    text = benchmark.tables(size, Accelerator(cpu=True), options)
    names = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|")]
    kept = ["published", *baseline.ARITHMETIC, "crop", "bf16", "even", "step"]
    assert names == ["saving", "---", *kept, "saving", "---", "step", "shared pass", "fused attention"]
