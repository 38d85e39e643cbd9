"""Codes that stay under noise and gain: the loss's values, what it moves, a training with it beside one without."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from test_codec_training import config, metrics
from test_distillation import cell

from recipes.commands import train_tokenizer
from recipes.config import ConfigError
from recipes.tokenizer_training.config import model_sizes
from recipes.tokenizer_training.data import make_crops
from recipes.tokenizer_training.networks import new_state
from recipes.tokenizer_training.objective import make_objective
from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.training.invariance import InvarianceConfig, invariance_loss
from tokenizer.training.step import train_step

ON = {"weight": 2.0}


def test_the_loss_is_the_cross_entropy_of_the_entry_and_counts_kept_codes() -> None:
    entries = torch.eye(4)
    codes = torch.tensor([[0, 1, 2], [3, 0, -1]])
    mask = codes >= 0
    same = entries[codes.clamp(min=0)]
    loss, kept = invariance_loss(5 * same, entries, codes, mask, temperature=0.5)  # directions alone count
    assert float(loss) == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 3)), abs=1e-5) and float(kept) == 1
    moved = same.clone()
    moved[0, 0] = entries[3]
    other, kept = invariance_loss(moved, entries, codes, mask, 0.5)
    assert other > loss and float(kept) == pytest.approx(4 / 5)


def test_batches_equal_singles_and_padding_counts_nothing() -> None:
    torch.manual_seed(0)
    projected, entries = torch.randn(3, 10, 4), torch.randn(16, 4)
    codes, lengths = torch.randint(0, 16, (3, 10)), [10, 6, 3]
    mask = torch.arange(10) < torch.tensor(lengths)[:, None]
    singles = [
        invariance_loss(projected[i : i + 1, :n], entries, codes[i : i + 1, :n], mask[i : i + 1, :n], 0.1)[0]
        for i, n in enumerate(lengths)
    ]
    together, _ = invariance_loss(projected, entries, codes.masked_fill(~mask, -1), mask, 0.1)
    torch.testing.assert_close(together, torch.stack(singles).mean())


def batch_of(n: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    values = 0.1 * torch.randn(n, 1, 8000)
    return {
        "input_values": values,
        "changed_values": 0.5 * values + 0.05 * torch.randn(n, 1, 8000),
        "padding_mask": torch.arange(8000) < torch.tensor([8000, 5000][:n])[:, None],
        "n_acoustic_books": torch.tensor([2, 1][:n]),
        "semantic_only": torch.tensor([False, True][:n]),
    }


def test_it_moves_the_semantic_encoder_and_its_projection_alone(tmp_path) -> None:
    settings = cell("", tmp_path / "run", None, "none", invariance=ON)
    accelerator = Accelerator(cpu=True)
    model = new_state(settings, accelerator).model
    batch = batch_of()
    codes = model.encode(batch["input_values"], batch["padding_mask"])
    projected = model.semantic_projection(batch["changed_values"], batch["padding_mask"])
    assert projected.shape == (2, codes.audio_codes.shape[-1], 8)
    book = model.quantizer.books[0].codebook.weight
    invariance_loss(projected, book, codes.audio_codes[:, 0], codes.audio_codes_mask, 0.1)[0].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {name.split(".")[0] for name in reached} == {"semantic_encoder", "quantizer"}
    in_quantizer = {name for name in reached if name.startswith("quantizer.")}
    assert in_quantizer == {f"quantizer.books.0.project_in.{part}" for part in ("weight", "bias")}


def test_what_is_looked_up_is_what_encode_looks_up(tmp_path) -> None:
    settings = cell("", tmp_path / "run", None, "none")
    model = new_state(settings, Accelerator(cpu=True)).model.eval()
    batch = batch_of()
    codes = model.encode(batch["input_values"], batch["padding_mask"])
    projected = model.semantic_projection(batch["input_values"], batch["padding_mask"])
    entries = model.quantizer.books[0].codebook.weight
    _, kept = invariance_loss(projected, entries, codes.audio_codes[:, 0], codes.audio_codes_mask, 0.1)
    assert float(kept) == 1.0


def test_steps_bring_the_codes_of_the_changed_crops_nearer(tmp_path) -> None:
    settings = cell("", tmp_path / "run", None, "none", invariance=ON, training={"revive_steps": 0})
    accelerator = Accelerator(cpu=True)
    state = new_state(settings, accelerator)
    objective = make_objective(settings, accelerator)
    found = []
    for step in range(40):
        state.step = step
        found.append(train_step(state, [batch_of()], objective, settings.training, accelerator))
    assert found[-1]["loss/invariance"] < 0.7 * found[0]["loss/invariance"]
    assert found[-1]["loss/invariance_kept"] > found[0]["loss/invariance_kept"]


def test_a_training_hears_the_same_crops_with_it_and_accumulation_changes_nothing(make_corpus, tmp_path) -> None:
    manifest = make_corpus()
    with_it, without = (config(manifest, tmp_path / n, None, invariance=v) for n, v in (("a", ON), ("b", {})))
    changed, plain = make_crops(with_it), make_crops(without)
    for position in range(4):
        a, b = changed[position], plain[position]
        assert "changed_values" not in b and all(torch.equal(a[name], b[name]) for name in b)
        assert a["changed_values"].shape == a["input_values"].shape
        assert not torch.equal(a["changed_values"], a["input_values"])
        assert torch.equal(a["changed_values"], changed[position]["changed_values"])
        assert not a["changed_values"][0, ~a["padding_mask"]].any()
    train_tokenizer.run(with_it)
    short = {"accumulation": 2}
    train_tokenizer.run(config(manifest, tmp_path / "c", None, invariance=ON, training=short))
    one, two = metrics(tmp_path / "a"), metrics(tmp_path / "c")
    assert one[0]["loss/invariance"] == pytest.approx(two[0]["loss/invariance"], rel=1e-4)
    assert one[0]["loss/total"] == pytest.approx(two[0]["loss/total"], rel=1e-4)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"changes.speed=0.1: must be 0"):
        InvarianceConfig(changes=AugmentationConfig())
    with pytest.raises(ValueError, match="weight=-1.*temperature=0"):
        InvarianceConfig(weight=-1, temperature=0)
    fsq = {"semantic_quantizer": "fsq", "fsq_levels": [4, 4, 2], "codebook_sizes": [32, 16, 16]}
    settings = config("", "run", None, invariance=ON, model=fsq)
    with pytest.raises(ConfigError, match="invariance.weight.*fsq"):
        model_sizes(settings)
