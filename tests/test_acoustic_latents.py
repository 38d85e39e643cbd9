"""The acoustic stage that predicts latents: training by each objective, decoding, resume, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_acoustic import _stop_after, rows
from transformers import AutoModel

from recipes.commands import train_acoustic
from recipes.config import ConfigError, load_config
from slm.acoustic.configuration import AcousticError, AcousticSizes, LatentConfig, LatentSettings
from slm.acoustic.latent_decoding import fill_latents
from slm.acoustic.latent_model import LatentModel, draw_latent_sample, new_latent_model
from slm.acoustic.latent_scores import latent_scores
from slm.acoustic.latent_space import LatentSpace, fit_latent_space
from slm.acoustic.pieces import AcousticDecoding, Piece
from slm.acoustic.samples import AcousticSamples, VoicedUtterances, collate, evaluation_items
from slm.acoustic.stages import fill_speech, load_acoustic_model
from slm.acoustic.training import AcousticTraining
from slm.corpus import CodedCorpusWriter, CorpusMetadata
from tokenizer import load_tokenizer

SIZES = {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 48, "dropout": 0.0}
BOOKS, LATENT_DIM = [10, 7, 9], 12
OBJECTIVES = ("flow", "diffusion", "regression")


def space() -> LatentSpace:
    """What the codes of `rows` add to latents of 12 channels, book 1 in three of them and book 2 in others."""
    generator = torch.Generator().manual_seed(0)
    entries = [torch.zeros(size, LATENT_DIM) for size in BOOKS[1:]]
    entries[0][:, :3] = 4 * torch.randn(BOOKS[1], 3, generator=generator) + 1
    entries[1][:, 5:7] = torch.randn(BOOKS[2], 2, generator=generator)
    return fit_latent_space(BOOKS[0], entries, (row["audio_codes"] for row in rows()), 1.0)


def model(objective: str = "flow", **changes) -> LatentModel:
    fitted = space()
    values = {"codebook_sizes": BOOKS, "fingerprint": "f" * 64, "tokenizer": "tiny", "frame_rate": 10.0}
    values |= {"min_prompt_s": 0.4, "max_prompt_s": 0.8, "window_s": 2.0, "objective": objective, "n_added_books": 2}
    values |= {"latent_dim": LATENT_DIM, "space_dim": len(fitted.directions)} | SIZES
    return new_latent_model(LatentConfig(**(values | changes)), fitted, 0)


def samples(stage: LatentModel, length: int = 100) -> AcousticSamples:
    return AcousticSamples(VoicedUtterances(rows(), stage.config), draw_latent_sample, length, 0)


def learn(stage: LatentModel, steps: int) -> LatentModel:
    drawn, optimizer = samples(stage, 10**6), torch.optim.AdamW(stage.parameters(), 3e-3)
    for step in range(steps):
        loss = stage.train()(**collate([drawn[16 * step + i] for i in range(16)])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return stage.eval()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_twice_are_equal_and_move_no_random_stream(objective: str) -> None:
    stage, stream = model(objective, dropout=0.5).train(), torch.get_rng_state()
    items = evaluation_items(VoicedUtterances(rows(), stage.config), 10, 0)
    first, second = (latent_scores(stage, items) for _ in range(2))
    assert first == second and torch.equal(stream, torch.get_rng_state()) and stage.training


def items_and_voices() -> tuple[list[np.ndarray], list[np.ndarray]]:
    codes = [row["audio_codes"] for row in rows()]
    return codes, [item[:, :8] for item in codes[2:] + codes[:2]]  # of the same speaker


def fill(stage: LatentModel, items, voices, settings=None, seed: int = 0) -> list[np.ndarray]:
    return fill_speech(stage, [i[:1] for i in items], voices, [f"k{n}" for n in range(len(items))], settings, seed)


def added(stage: LatentModel, codes: np.ndarray) -> np.ndarray:
    """What the books of codes (K, F) add, (D, F)."""
    both = torch.from_numpy(codes)[None]
    return stage.space.latents(stage.points(both), both[:, 0])[0].T.numpy()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_reach_every_parameter_and_the_condition_alone_is_read(objective):
    stage = model(objective, condition_dropout=0.5).train()
    drawn = samples(stage)
    batch = collate([drawn[n] for n in range(16)])
    assert 0 < batch["dropped"].sum() < 16 and batch["noise"].shape[1:] == (5, batch["prompt"].shape[1])
    stage(**batch).loss.backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []
    mixture = torch.randn(16, batch["prompt"].shape[1], 5)
    state = {name: batch[name] for name in ("audio_codes", "prompt", "frames", "time")}
    with torch.no_grad():
        for dropped, name, changed in (
            (False, "the target's other books", False),
            (False, "book 0", True),
            (False, "the voice", True),
            (True, "book 0", False),
            (True, "the voice", False),
        ):
            codes = batch["audio_codes"].clone()
            target = (batch["frames"] & ~batch["prompt"])[:, None]
            where = target.expand_as(codes).clone()
            if name == "the voice":
                where = (batch["prompt"][:, None]).expand_as(codes).clone()
            where[:, 0] = name == "book 0"
            where[:, 1:] &= name != "book 0"
            codes[where & (codes >= 0)] = 3
            flags = torch.full((16,), dropped)
            one, other = (stage.eval().predict(**(state | {"audio_codes": c}), mixture=mixture, dropped=flags)
                          for c in (batch["audio_codes"], codes))  # fmt: skip
            wanted = target[:, 0]
            assert torch.equal(one[wanted], other[wanted]) != changed, (dropped, name)


def test_a_batch_equals_its_items_and_padding_changes_nothing():
    stage = model().eval()
    drawn = samples(stage)
    batch = collate([drawn[n] for n in range(6)])
    mixture = batch.pop("noise").transpose(1, 2)
    with torch.no_grad():
        together = stage.predict(mixture=mixture, **batch)
        for row in range(6):
            alone = collate([drawn[row]])
            length = int(batch["frames"][row].sum())
            found = stage.predict(mixture=alone.pop("noise").transpose(1, 2), **alone)
            assert torch.allclose(found[0], together[row, :length], atol=1e-5)


def test_drawing_does_not_depend_on_the_batch_and_follows_the_seed():
    stage, (items, voices) = model().eval(), items_and_voices()
    items = [np.concatenate([item, item], axis=1) for item in items]  # longer than window_s, so in pieces
    settings = AcousticDecoding(steps=3, guidance=1.5)
    together = fill(stage, items, voices, settings)
    for n, item in enumerate(items[:3]):
        alone = fill_speech(stage, [item[:1]], [voices[n]], [f"k{n}"], AcousticDecoding(3, guidance=1.5, batch_size=1))
        assert together[n].shape == (LATENT_DIM, item.shape[1]) and together[n].dtype == np.float32
        assert np.allclose(alone[0], together[n], atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(fill(stage, items, voices, settings), together, strict=True))
    assert not np.allclose(fill(stage, items, voices, settings, 1)[0], together[0], atol=1e-2)
    calm = [AcousticDecoding(steps=3, temperature=0.0)] * 2
    assert np.array_equal(fill(stage, items, voices, calm[0])[0], fill(stage, items, voices, calm[1], 1)[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_recovers_what_it_has_learnt_in_the_voice(objective):
    stage = learn(model(objective, condition_dropout=0.0), 200)
    items, voices = items_and_voices()
    spread = np.concatenate([added(stage, item) for item in items], axis=1).std()
    for settings in (AcousticDecoding(steps=16), AcousticDecoding(steps=16, temperature=0.0)):
        for item, found in zip(items, fill(stage, items, voices, settings), strict=True):
            assert np.sqrt(np.mean((found - added(stage, item)) ** 2)) < 0.2 * spread
    swapped = fill(stage, items, voices[1:] + voices[:1])  # the other speaker's voice
    far = [np.sqrt(np.mean((f - added(stage, i)) ** 2)) for f, i in zip(swapped, items, strict=True)]
    assert min(far) > 0.3 * spread
    scores = latent_scores(stage, evaluation_items(VoicedUtterances(rows(), stage.config), 10, 0))
    assert scores["explained"] > 0.8 and scores.keys() == {"loss", "explained"}


def test_guidance_moves_away_from_what_is_predicted_without_a_condition():
    stage = model("regression").eval()
    items, voices = items_and_voices()
    at = [fill(stage, items, voices, AcousticDecoding(guidance=weight))[0] for weight in (0.0, 1.0, 3.0)]
    assert np.allclose(at[2], at[0] + 3 * (at[1] - at[0]), atol=1e-4) and not np.allclose(at[0], at[1], atol=1e-3)


def test_folders_load_again_and_what_does_not_fit_is_refused_by_name(tmp_path):
    stage, (items, voices) = model().eval(), items_and_voices()
    stage.save_pretrained(tmp_path / "stage")
    for loaded in (load_acoustic_model(tmp_path / "stage"), AutoModel.from_pretrained(tmp_path / "stage").eval()):
        assert np.array_equal(fill(loaded, items, voices)[0], fill(stage, items, voices)[0])
    file = tmp_path / "stage" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"objective": "masked"}))
    with pytest.raises(AcousticError, match="objective 'masked'.*flow, diffusion, regression"):
        load_acoustic_model(tmp_path / "stage")
    piece = Piece(items[0][:2], voices[0], "k")
    with pytest.raises(AcousticError, match="2 books are given.*objective flow adds the sum"):
        fill_latents(stage, [piece], AcousticDecoding())
    for values, message in (
        ({"books": -1}, "latents.books: -1"),
        ({"variance": 0.0}, "latents.variance: 0 "),
        ({"condition_dropout": 1.0}, "latents.condition_dropout: 1 "),
    ):
        with pytest.raises(AcousticError, match=message):
            LatentSettings(**values)
    with pytest.raises(AcousticError, match="guidance: -1"):
        AcousticDecoding(guidance=-1.0)


def write_corpus(folder: Path, tokenizer: Path, **changes) -> Path:
    """Random codes of the tiny tokenizer."""
    codec = load_tokenizer(tokenizer)
    sizes = codec.config.codebook_sizes
    facts = {"fingerprint": codec.fingerprint("fp32"), "codebook_sizes": sizes, "frame_rate": codec.config.frame_rate}
    writer = CodedCorpusWriter(
        folder, CorpusMetadata(**(facts | {"sampling_rate": 16000, "tokenizer": str(tokenizer)} | changes))
    )
    rng = np.random.default_rng(0)

    def utterance(number: int) -> dict:
        codes = np.stack([rng.integers(0, size, 14 + number) for size in sizes])
        return {"id": f"u{number}", "text": "", "speaker": "s", "duration": 1.0, "audio_codes": codes}

    writer.write_shard("train", 0, 1, [utterance(number) for number in range(8)])
    writer.write_shard("valid", 0, 1, [utterance(number) for number in range(3)])
    writer.finish()
    return folder


def recipe(tmp_path: Path, tokenizer: Path, name: str = "run", **changes) -> train_acoustic.Config:
    if not (tmp_path / "codes").exists():
        write_corpus(tmp_path / "codes", tokenizer)
    training = AcousticTraining(steps=6, batch_size=4, warmup_steps=1, log_steps=1, eval_steps=3, save_steps=3)
    values = {"min_prompt_s": 0.4, "max_prompt_s": 0.8, "window_s": 2.0, "device": "cpu", "precision": "fp32"}
    values |= {"sizes": AcousticSizes(**(SIZES | {"dropout": 0.1})), "training": training, "objective": "flow"}
    values |= {"run_dir": str(tmp_path / name), "corpus": str(tmp_path / "codes")}
    return train_acoustic.Config(**(values | changes))


def test_training_resumes_to_the_same_bits_and_moves_the_parameters_alone(tmp_path, tiny_tokenizer):
    straight = train_acoustic.run(recipe(tmp_path, tiny_tokenizer))
    halves = recipe(tmp_path, tiny_tokenizer, "halves")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_acoustic, "TrainerProgress", lambda name: _stop_after(3))
        with pytest.raises(KeyboardInterrupt):
            train_acoustic.run(halves)
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, train_acoustic.run(halves)))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    data = train_acoustic.read_data(halves, train_acoustic.open_corpus(halves))
    start, parameters = train_acoustic.new_model(data, 0), set()
    parameters = {name for name, _ in start.named_parameters()}
    moved = {name for name, value in start.state_dict().items() if not torch.equal(value, one[name])}
    assert moved == parameters and any(name.startswith("space.") for name in one)
    summary = json.loads((tmp_path / "run" / "complete.json").read_text())["summary"]
    assert {"steps", "loss", "explained"} <= summary.keys()


def test_what_the_books_add_is_what_the_tokenizer_s_decoder_reads(tmp_path, tiny_tokenizer):
    config = recipe(tmp_path, tiny_tokenizer, latents=LatentSettings(variance=1.0))
    data = train_acoustic.read_data(config, train_acoustic.open_corpus(config))
    stage, codec = train_acoustic.new_model(data, 0), load_tokenizer(tiny_tokenizer)
    codes = torch.from_numpy(data.train.codes[0].astype(np.int64))[None]
    with torch.inference_mode():
        whole = codec.latents_of(codes[:, :1]) + torch.from_numpy(added(stage, codes[0].numpy()))
        assert torch.allclose(whole, codec.latents_of(codes), atol=1e-4)
        assert torch.allclose(codec.decode_latents(whole).audio_values, codec.decode(codes).audio_values, atol=1e-3)
        with pytest.raises(ValueError, match=r"latents must be of shape \(B, 32, F\)"):
            codec.decode_latents(whole[:, :5])
    few = recipe(tmp_path, tiny_tokenizer, latents=LatentSettings(books=1, variance=1.0))
    data = train_acoustic.read_data(few, train_acoustic.open_corpus(few))
    stage = train_acoustic.new_model(data, 0)
    with torch.inference_mode():
        whole = codec.latents_of(codes[:, :1]) + torch.from_numpy(added(stage, codes[0].numpy()))
        assert torch.allclose(whole, codec.latents_of(codes[:, :2]), atol=1e-4)


def test_corpora_that_do_not_fit_are_refused_by_key(tmp_path, tiny_tokenizer):
    with pytest.raises(AcousticError, match="latents.books: 3: the tokenizer has 2"):
        train_acoustic.plan(recipe(tmp_path, tiny_tokenizer, latents=LatentSettings(books=3)))
    write_corpus(tmp_path / "other", tiny_tokenizer, fingerprint="0" * 64)
    with pytest.raises(ConfigError, match="objective=flow: .* is not what .*other was encoded with.*objective=masked"):
        train_acoustic.plan(recipe(tmp_path, tiny_tokenizer, corpus=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="objective"):
        load_config(train_acoustic.Config, None, ["objective=guess"])
