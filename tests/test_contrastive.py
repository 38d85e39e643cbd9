"""Contrastive distillation: aligned characters to frames, the loss's known values, what it moves, and a whole run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_codec_training import config, metrics
from test_distillation import ALL, cell

from recipes.commands import train_tokenizer
from recipes.config import ConfigError, from_values
from recipes.tokenizer_training.data import make_crops
from recipes.tokenizer_training.networks import new_state
from recipes.tokenizer_training.objective import make_objective
from tokenizer import load_tokenizer
from tokenizer.data.characters import KNOWN, N_CLASSES, OTHER, frame_characters, read_spans
from tokenizer.data.utterances import DataError, Utterance
from tokenizer.teacher.contrastive import ContrastiveProjection, contrastive_loss
from tokenizer.training.objective import codec_losses


def aligned(manifest, seconds: float = 0.1):
    """Writes the column into a manifest: a letter every so many seconds."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        letters = enumerate("abcdefgh")
        row["characters"] = [
            {"character": c, "start": round(n * seconds, 3), "end": round((n + 1) * seconds, 3)} for n, c in letters
        ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def test_a_frame_is_the_character_that_fills_most_of_it() -> None:
    spans = [(3, 0.0, 0.05), (4, 0.05, 0.2), (5, 0.3, 0.32)]
    assert frame_characters(spans, 0.0, 0.08, 3).tolist() == [3, 4, 4]
    assert frame_characters(spans, 0.16, 0.08, 3).tolist() == [4, 5, 0]  # a later piece
    assert frame_characters(spans, 0.0, 0.16, 2).tolist() == [4, 4]  # twice as fast: a frame holds twice as much
    assert frame_characters([], 0.0, 0.08, 2).tolist() == [0, 0]


def test_the_column_is_read_or_refused_with_the_way_out() -> None:
    def row(value: object) -> Utterance:
        return Utterance("u", "u.wav", columns={"characters": json.dumps(value) if value else ""})

    item = {"character": "A", "start": 0, "end": 0.5}
    assert read_spans(row([item, {**item, "character": "ß"}])) == [(KNOWN.index("a"), 0, 0.5), (OTHER, 0, 0.5)]
    with pytest.raises(DataError, match="u.wav: no column characters.*`slm align`.*another distillation.kind"):
        read_spans(row(None))
    for wrong in ([{**item, "end": -1}], [{"character": "a"}], ["a"], 3):
        with pytest.raises(DataError, match="u.wav: the column characters is no list"):
            read_spans(row(wrong))


@pytest.mark.parametrize("n_alike", [1, 3])
def test_at_chance_the_loss_is_log_n(n_alike: int) -> None:
    characters = torch.arange(12)[None] // n_alike
    loss, share = contrastive_loss(torch.full((1, 12, 12), 0.7), characters)
    assert float(loss) == pytest.approx(math.log(12), abs=1e-5) and float(share) == pytest.approx(1.0, abs=1e-4)
    perfect = 100.0 * (characters[:, :, None] == characters[:, None, :])
    loss, share = contrastive_loss(perfect, characters)
    assert float(loss) == pytest.approx(math.log(n_alike), abs=1e-4) and float(share) == pytest.approx(0.0, abs=1e-3)


def test_batches_equal_singles_and_padding_counts_nothing() -> None:
    torch.manual_seed(0)
    similarities, characters = torch.randn(3, 10, 10), torch.randint(0, 5, (3, 10))
    lengths = [10, 6, 3]
    mask = torch.arange(10) < torch.tensor(lengths)[:, None]
    singles = [
        contrastive_loss(similarities[i : i + 1, :n, :n], characters[i : i + 1, :n])[0] for i, n in enumerate(lengths)
    ]
    together, _ = contrastive_loss(similarities, characters, mask)
    torch.testing.assert_close(together, torch.stack(singles).mean())


def test_the_gradient_reaches_encoder_and_semantic_book_and_nothing_of_the_acoustic_side(tmp_path) -> None:
    settings = cell("", tmp_path / "run", None, "contrastive")
    accelerator = Accelerator(cpu=True)
    state = new_state(settings, accelerator)
    objective = make_objective(settings, accelerator)
    assert objective.teacher is None and objective.distillation_weight == 1.0
    values = 0.1 * torch.randn(2, 1, 8000)
    output = state.model(values, auxiliary=settings.distillation.auxiliary)
    characters = torch.randint(0, N_CLASSES, (2, output.quantized_semantic.shape[-1]))
    losses = codec_losses(objective, output, values, state.model.config, None, state.projection, None, characters)
    losses["distillation"].backward()
    reached = {name for name, p in state.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in reached} == {"semantic_encoder", "quantizer"}
    assert {name.split(".")[2] for name in reached if name.startswith("quantizer.")} == {"0"}
    assert all(p.grad.any() for p in state.projection.parameters())


def test_it_fits_a_tiny_batch() -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 16, 12, requires_grad=True)
    characters = torch.randint(0, 6, (2, 12))
    projection = ContrastiveProjection(16, N_CLASSES)
    optimizer = torch.optim.Adam([latents, *projection.parameters()], 1e-2)
    shares = []
    for _ in range(150):
        loss, share = contrastive_loss(projection(latents, characters), characters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(float(share))
    assert shares[0] > 0.5 and shares[-1] < 0.05


def test_a_run_without_a_teacher_moves_all_but_the_auxiliary_decoder_and_resumes(make_corpus, tmp_path) -> None:
    manifest = aligned(make_corpus())
    changes = {"distillation": {"kind": "contrastive"}, "discriminator": {"enabled": False}}
    settings = config(manifest, tmp_path / "whole", None, **changes)
    assert train_tokenizer.plan(settings)["teacher"] == "none is heard"
    torch.manual_seed(settings.seed)
    fresh = new_state(settings, Accelerator(cpu=True)).model.state_dict()
    fresh = {name: tensor.clone() for name, tensor in fresh.items()}
    trained = load_tokenizer(train_tokenizer.run(settings))
    moved = {name.split(".")[0] for name, p in trained.named_parameters() if not torch.equal(p, fresh[name])}
    assert moved == ALL - {"auxiliary_decoder"}
    rows = metrics(tmp_path / "whole")
    assert all(np.isfinite(row["loss/distillation"]) for row in rows if "loss/mel" in row)
    assert any(row.get("loss/distillation", 0) > 0 for row in rows)

    short = config(manifest, tmp_path / "cut", None, **changes, training={"steps": 2, "schedule_steps": 4})
    longer = config(manifest, tmp_path / "cut", None, **changes, training={"steps": 4, "schedule_steps": 4})
    train_tokenizer.run(short)
    resumed = load_tokenizer(train_tokenizer.run(longer))
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(parameter, resumed.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_data_without_alignment_is_refused_before_anything_is_made(make_corpus, tmp_path) -> None:
    manifest = make_corpus()
    settings = config(manifest, tmp_path / "run", None, distillation={"kind": "contrastive"})
    with pytest.raises(DataError, match="no column characters"):
        train_tokenizer.plan(settings)
    settings.data[0] = from_values(type(settings.data[0]), {"path": "owner/name", "stream": True})
    with pytest.raises(ConfigError, match="which a stream has not"):
        train_tokenizer.plan(settings)
    assert not (tmp_path / "run").exists()


def test_characters_follow_the_crop(make_corpus, tmp_path) -> None:
    """What a crop is told is what its own piece of the recording says, at its own speed."""
    manifest = aligned(make_corpus(), seconds=0.16)
    settings = config(manifest, tmp_path / "run", None, distillation={"kind": "contrastive"}, augmentation={"speed": 0})
    crops = make_crops(settings)
    for n in range(4):
        item, (utterance, _, _, _, start) = crops[n], crops._draw(crops.audio.key(n))
        wanted = frame_characters(read_spans(utterance), start / 16000, 0.08, 7)
        assert item["characters"].tolist() == wanted.tolist() and item["characters"].dtype == torch.int64
    plain = config(manifest, tmp_path / "run", None, augmentation={"speed": 0})
    assert "characters" not in make_crops(plain)[0]
