"""The ablations: which parameters each switch moves and which it must not, and the configurations that set them."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from test_codec_training import TINY
from test_distillation import ALL, cell, one_step

from recipes.commands import train_tokenizer
from recipes.config import CONFIGS, ConfigError, dump_config, load_config
from recipes.tokenizer_training.networks import freeze_parts, new_state
from tokenizer import LMSPTConfig, LMSPTModel
from tokenizer.model.configuration import preset_config
from tokenizer.model.fsq import FiniteScalarQuantizer
from tokenizer.model.quantizer import SplitQuantizer
from tokenizer.teacher.distillation import DistillationConfig, distillation_losses
from tokenizer.teacher.whisper import SpeechTeacher, TeacherConfig

ABLATIONS = CONFIGS / "ablations"
FSQ = {"semantic_quantizer": "fsq", "fsq_levels": [4, 4, 2]}
DAC = {
    "decoder_architecture": "dac", "decoder_width": 32, "decoder_depths": [], "decoder_layers": 0,
    "decoder_strides": [4, 5, 8, 8], "auxiliary_strides": [160, 4, 2],
}  # fmt: skip


def tiny(**changes):
    torch.manual_seed(0)
    return LMSPTModel(preset_config("nano-12.5hz", **{**TINY, **changes}))


def reached_by(loss, model):
    """Parts of the model that a loss gives a gradient to."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


# --- what moves in a training step -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "still", "parts"),
    [
        ({"freeze": ["auxiliary_decoder"]}, {"auxiliary_decoder"}, ALL),
        ({"freeze": ["semantic_encoder", "quantizer.books.0"]}, {"semantic_encoder", "quantizer.books.0"}, ALL),
        ({"model": {**TINY, "auxiliary_decoder": "shared"}}, set(), ALL - {"auxiliary_decoder"}),
        ({"model": {**TINY, "shared_encoder": True}}, set(), ALL - {"acoustic_encoder"}),
        ({"model": {**TINY, "auxiliary_decoder_width": 64}}, set(), ALL),
        ({"model": {**TINY, **FSQ}}, set(), ALL),
        ({"model": {**TINY, **DAC}}, set(), ALL),
        ({"model": {**TINY, "causal": True}}, set(), ALL),
        ({"model": {**TINY, "semantic_subtraction": "none"}}, set(), ALL),
        ({"layer": 1}, set(), ALL),
    ],
    ids=[
        "frozen-auxiliary", "frozen-semantic", "shared-decoder", "shared-encoder", "larger-auxiliary", "fsq",
        "dac-decoder", "causal", "no-subtraction", "teacher-layer",
    ],
)  # fmt: skip
def test_every_part_moves_but_the_frozen(tmp_path, tiny_teacher, switches, still, parts):
    sizes = {key: value for key, value in switches.items() if key != "layer"}
    settings = cell("", tmp_path / "run", tiny_teacher, "resynthesis", **sizes)
    settings.teacher.layer = switches.get("layer")
    torch.manual_seed(0)
    before = new_state(settings, Accelerator(cpu=True)).model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    _, after, figures, _ = one_step(settings)
    assert {name.split(".")[0] for name in after} == parts
    frozen = {name for name in after if name.startswith(tuple(f"{part}." for part in still))}
    assert bool(frozen) == bool(still)
    stood = {name for name in after if torch.equal(before[name], after[name])}
    # single tensors may stand for want of gradient (a Snake at rest, a codebook of few frames), no block may
    assert frozen <= stood
    for part in {".".join(name.split(".")[:3]) for name in after if name not in frozen and "books" not in name}:
        assert any(name not in stood for name in after if name.startswith(part)), f"{part} did not move"
    assert figures["loss/distillation"] > 0


def test_the_gradient_passes_a_frozen_auxiliary_decoder():
    model = tiny()
    model.auxiliary_decoder.requires_grad_(False)
    output = model(torch.randn(1, 1, 8000))
    assert reached_by(output.auxiliary_values.square().sum(), model) == {"semantic_encoder", "quantizer"}


def test_a_decoupled_decoder_shields_the_main_one_from_the_teacher_and_a_shared_one_does_not(tiny_teacher):
    teacher = SpeechTeacher.from_pretrained(TeacherConfig(str(tiny_teacher)))
    values = 0.1 * torch.randn(1, 1, 8000)
    reached = {}
    for kind in ("decoupled", "shared"):
        model = tiny(auxiliary_decoder=kind)
        output = model(values)
        losses = distillation_losses(DistillationConfig(), teacher, None, output, values, model.config)
        reached[kind] = reached_by(losses["distillation"], model)
        assert "auxiliary_decoder" not in reached_by(output.audio_values.square().sum(), model)
    assert reached["decoupled"] == {"semantic_encoder", "quantizer", "auxiliary_decoder"}
    assert reached["shared"] == {"semantic_encoder", "quantizer", "decoder"}


def test_a_shared_encoder_is_one_set_of_parameters_that_both_sides_move():
    model = tiny(shared_encoder=True)
    encoders = {name.split(".")[0] for name, _ in model.named_parameters() if "encoder" in name.split(".")[0]}
    assert encoders == {"semantic_encoder"}
    output = model(torch.randn(1, 1, 8000))
    for loss in (output.semantic_commitment_loss, output.acoustic_commitment_loss):
        assert "semantic_encoder" in reached_by(loss, model)


@pytest.mark.parametrize("subtraction", ["attached", "detached", "none"])
def test_subtraction_decides_whether_acoustic_losses_reach_the_semantic_encoder(subtraction):
    model = tiny(semantic_subtraction=subtraction)
    output = model(torch.randn(2, 1, 8000))
    reached = reached_by(output.acoustic_commitment_loss + output.acoustic_codebook_loss, model)
    assert ("semantic_encoder" in reached) == (subtraction == "attached")
    assert "acoustic_encoder" in reached
    # the value is that of the subtraction, attached or not
    codes = tiny(semantic_subtraction="attached").encode(torch.ones(1, 1, 8000)).audio_codes
    same = torch.equal(codes, model.encode(torch.ones(1, 1, 8000)).audio_codes)
    assert same == (subtraction != "none")


def test_a_frozen_book_is_not_revived():
    quantizer = SplitQuantizer(LMSPTConfig(latent_dim=12, codebook_sizes=[16] * 2, codebook_dim=4))
    quantizer.books[0].requires_grad_(False)
    for book in quantizer.books:
        book.usage.zero_()
    before = quantizer.books[0].codebook.weight.clone()
    assert quantizer.revive_dead_codes([torch.randn(1, 5, 4)] * 2, None, torch.Generator(), 0.5) == [0, 16]
    assert torch.equal(before, quantizer.books[0].codebook.weight)


def test_switches_that_cannot_work_are_named(tmp_path, tiny_teacher):
    def refuse(match, kind="resynthesis", probe=False, **changes):
        settings = cell("", tmp_path / "run", tiny_teacher, kind, probe, **changes)
        with pytest.raises(ConfigError, match=match):
            new_state(settings, Accelerator(cpu=True))

    refuse("'main_decoder' is no part.*semantic_encoder, acoustic_encoder", freeze=["main_decoder"])
    refuse("leaves nothing to train", freeze=sorted(ALL))
    refuse("probe trains an auxiliary decoder", "pooled", True, freeze=["auxiliary_decoder"])
    refuse("probe trains an auxiliary decoder", "none", True, model={**TINY, "auxiliary_decoder": "shared"})
    for layer in (0, 3):
        with pytest.raises(ValueError, match=f"teacher.layer={layer}: this teacher has layers 1 to 2"):
            SpeechTeacher.from_pretrained(TeacherConfig(str(tiny_teacher), layer=layer))


def test_a_teacher_layer_is_that_hidden_state(tiny_teacher):
    waveform = 0.1 * torch.randn(1, 8000)
    whole = SpeechTeacher.from_pretrained(TeacherConfig(str(tiny_teacher)))
    seen = {}
    for index, layer in enumerate(whole.encoder.layers, start=1):
        layer.register_forward_hook(lambda *args, n=index: seen.update({n: args[-1]}))
    last = whole(waveform)
    for n, hidden in seen.items():
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        cut = SpeechTeacher.from_pretrained(TeacherConfig(str(tiny_teacher), layer=n))
        torch.testing.assert_close(cut(waveform), hidden)
    torch.testing.assert_close(last, whole.encoder.layer_norm(hidden))
    assert not torch.allclose(last, hidden)


# --- finite scalar quantization --------------------------------------------------------------------------------------


def test_fsq_codes_go_to_values_and_back():
    levels = [8, 5, 4, 2]
    book = FiniteScalarQuantizer(6, levels)
    codes = torch.arange(book.size)
    values = book.values(codes)
    assert book.size == 320 and len(values.unique(dim=0)) == 320
    assert values.min() == -1 and values.max() == 1
    for column, count in enumerate(levels):
        assert len(values[:, column].unique()) == count
    # entries put in by an identity come back as their own codes: bounding and rounding undo `values`
    with torch.no_grad():
        book.project_in.weight.copy_(torch.eye(4, 6))
        book.project_in.bias.zero_()
    half = torch.tensor(levels) // 2
    reach = (torch.tensor(levels) - 1) * 1.001 / 2
    offset = (torch.tensor(levels) % 2 == 0) * 0.5
    latents = torch.atanh((values * half + offset) / reach) - torch.atanh(offset / reach)
    output = book(torch.nn.functional.pad(latents, (0, 2))[None], None)
    assert torch.equal(output.codes[0], codes)
    torch.testing.assert_close(output.quantized[0], book.look_up(codes[None], None)[0])


@pytest.mark.parametrize("levels", [[1024, 2], [3001]])
def test_fsq_of_very_many_levels_stays_within_its_codes(levels):
    book = FiniteScalarQuantizer(2, levels)
    latents = torch.tensor([[-1e4, -1e4], [1e4, 1e4], [0.0, 0.0]])[None]
    with torch.no_grad():
        book.project_in.weight.copy_(torch.eye(2)[: len(levels)])
        output = book(latents, None)
    assert output.codes.min() == 0 and output.codes.max() == book.size - 1


def test_fsq_learns_no_entry_and_passes_the_gradient():
    book = FiniteScalarQuantizer(12, [8, 5, 5])
    assert {name for name, _ in book.named_parameters()} == {
        "project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias",
    }  # fmt: skip
    latents = torch.randn(2, 5, 12, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    output = book(latents, mask)
    assert not output.commitment_loss.any() and not output.codebook_loss.any()
    assert (output.quantized[1, 2:] == 0).all()
    output.quantized.sum().backward()
    assert latents.grad[mask].abs().sum(-1).min() > 0 and not latents.grad[~mask].any()
    book.usage.zero_()
    assert book.revive(output.projected.flatten(0, 1), torch.Generator(), 0.5) == 0
    book.update_usage(output.codes, mask)
    assert book.usage.sum() == pytest.approx(0.01 * book.size)
    with torch.autocast("cpu", torch.bfloat16):
        under = book(latents, mask)
    assert torch.equal(under.codes, output.codes) and torch.equal(under.quantized, output.quantized)


def test_an_fsq_tokenizer_is_saved_and_loaded(tmp_path):
    model = tiny(**FSQ)
    values = 0.1 * torch.randn(2, 1, 9000)
    codes = model.encode(values).audio_codes
    assert 0 <= codes[:, 0].min() and codes[:, 0].max() < 32 and len(codes[:, 0].unique()) > 1
    model.save_pretrained(tmp_path)
    loaded = LMSPTModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(values).audio_codes, codes)
    torch.testing.assert_close(loaded.decode(codes).audio_values, model.decode(codes).audio_values)
    torch.testing.assert_close(model(values).quantized_semantic, model.quantizer.look_up(codes[:, :1], None).mT)


# --- the configurations ----------------------------------------------------------------------------------------------

SWITCHED = {
    "base": set(),
    "resynthesis": set(),
    "pooled": {"distillation"},
    "contrastive": {"distillation"},
    "none": {"distillation"},
    "teacher-layer": {"teacher"},
    "shared-decoder": {"model"},
    "frozen-decoder": {"init_from", "freeze"},
    "large-auxiliary-decoder": {"model"},
    "shared-encoder": {"model"},
    "dac-decoder": {"model"},
    "no-subtraction": {"model"},
    "detached-subtraction": {"model"},
    "fsq": {"model"},
    "causal": {"model"},
    "invariance": {"invariance"},
}


def test_every_ablation_is_listed():
    assert {file.stem for file in ABLATIONS.glob("*.yaml")} == set(SWITCHED)


@pytest.mark.parametrize("name", SWITCHED)
def test_an_ablation_changes_one_switch_of_the_base(name):
    import yaml

    base, config = (load_config(train_tokenizer.Config, f"ablations/{n}") for n in ("base", name))
    one, other = yaml.safe_load(dump_config(base)), yaml.safe_load(dump_config(config))
    changed = {key for key in one if one[key] != other[key]}
    assert changed == SWITCHED[name] | ({"run_dir"} if name != "base" else set())
    sizes = preset_config(config.preset, **config.model)
    assert sizes.frame_rate == 12.5
    # narrow, so that it is built in a moment: is there such a part to freeze, a decoder to probe?
    with torch.device("meta"):
        freeze_parts(config, LMSPTModel(sizes))
