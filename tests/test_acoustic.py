"""The acoustic stage: masks, batches, training to the codes, decoding, resume, and whose codes it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from slm_tiny import FINGERPRINT, write_corpus

from recipes.commands import train_acoustic
from recipes.config import ConfigError
from recipes.runs.run_folder import RunFolder
from slm.acoustic.configuration import AcousticConfig, AcousticError, AcousticSizes
from slm.acoustic.masked_model import new_acoustic_model
from slm.acoustic.masked_scores import book_scores, unigram_scores
from slm.acoustic.masking import draw_mask, draw_masked_sample, mask_book, masked_share
from slm.acoustic.pieces import AcousticDecoding
from slm.acoustic.samples import AcousticSamples, Item, VoicedUtterances, collate, evaluation_items
from slm.acoustic.stages import fill_speech, load_acoustic_model
from slm.acoustic.training import AcousticTraining
from slm.corpus import CodedCorpusWriter, CorpusMetadata

SIZES = {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 48, "code_dim": 16, "dropout": 0.0}
BOOKS = [10, 7, 9]
GREEDY = AcousticDecoding(steps=3, temperature=0.0, confidence_noise=0.0)


def config(**changes) -> AcousticConfig:
    values = {"codebook_sizes": BOOKS, "fingerprint": FINGERPRINT, "tokenizer": "tiny", "frame_rate": 10.0}
    return AcousticConfig(**(values | {"min_prompt_s": 0.4, "max_prompt_s": 0.8, "window_s": 2.0} | SIZES | changes))


def codes(n_frames: int, speaker: int, seed: int = 0) -> np.ndarray:
    """(K, F) whose acoustic books follow from book 0 and the speaker: (book 0 + speaker) modulo the book's size."""
    semantic = np.random.default_rng((seed, n_frames, speaker)).integers(0, BOOKS[0], n_frames)
    return np.stack([semantic, *((semantic + speaker) % size for size in BOOKS[1:])])


def rows(n: int = 8, frames: int = 12) -> list[dict]:
    return [
        {"id": f"u{i}", "text": "", "speaker": f"s{i % 2}", "duration": 1.0, "audio_codes": codes(frames + i, i % 2, i)}
        for i in range(n)
    ]


def write(folder, **changes):
    facts = {"fingerprint": FINGERPRINT, "codebook_sizes": BOOKS, "frame_rate": 10.0, "sampling_rate": 16000}
    writer = CodedCorpusWriter(folder, CorpusMetadata(**(facts | {"tokenizer": "tiny"} | changes)))
    writer.write_shard("train", 0, 1, rows())
    writer.write_shard("valid", 0, 1, rows(4, frames=9))
    writer.finish()
    return folder


def recipe(tmp_path, steps: int = 6, name: str = "run", **changes) -> train_acoustic.Config:
    corpus = tmp_path / "codes"
    if not corpus.exists():
        write(corpus)
    training = AcousticTraining(steps=steps, batch_size=4, warmup_steps=1, log_steps=1, eval_steps=3, save_steps=3)
    values = {"min_prompt_s": 0.4, "max_prompt_s": 0.8, "window_s": 2.0, "device": "cpu", "precision": "fp32"}
    values |= {"sizes": AcousticSizes(**(SIZES | {"dropout": 0.1})), "training": training}
    return train_acoustic.Config(str(tmp_path / name), str(corpus), **(values | changes))


@pytest.fixture(scope="module")
def trained():
    """A stage that has learnt `codes`, a few hundred steps."""
    model = new_acoustic_model(config(), 0).train()
    samples = AcousticSamples(VoicedUtterances(rows(), model.config), draw_masked_sample, 10**6, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(350):
        loss = model(**collate([samples[16 * step + i] for i in range(16)])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return model.eval()


def fill(model, items, voices, settings=GREEDY, seed=0):
    return fill_speech(model, [i[:1] for i in items], voices, [f"k{n}" for n in range(len(items))], settings, seed)


def test_masks_keep_the_prompt_and_lower_books_and_hide_the_rest():
    prompt = np.arange(20) < 8
    books = set()
    for seed in range(60):
        visible, targets = draw_mask(prompt, 4, np.random.default_rng(seed))
        book = int(targets.any(axis=1).argmax())
        books.add(book)
        assert targets.sum() >= 1 and not targets[[b for b in range(4) if b != book]].any()
        assert visible[:, prompt].all() and visible[:book].all() and not targets[:, prompt].any()
        assert not visible[book + 1 :, ~prompt].any() and (visible[book] == ~targets[book]).all()
    assert books == {1, 2, 3}
    visible, targets = mask_book(prompt, 4, 2)
    assert targets.sum() == 12 and visible[:2].all() and not visible[2:, ~prompt].any()
    assert masked_share(0) == 1 and masked_share(1) == pytest.approx(0) and masked_share(0.5) == pytest.approx(0.5**0.5)


def test_a_voice_is_another_utterance_of_the_speaker_or_the_own_beginning():
    pair = rows(4) + [{**rows(1, 20)[0], "speaker": "alone"}, {**rows(1, 3)[0], "speaker": "short"}]
    utterances = VoicedUtterances(pair, config())
    assert len(utterances) == 5 and utterances.n_left_out == 1
    for index in range(5):
        item = utterances.item(index, np.random.default_rng(index))
        assert 4 <= item.prompt.shape[1] <= 8 and item.target.shape[1] <= 20
        if index < 4:
            shift = index % 2
            assert ((item.prompt[0] + shift) % BOOKS[1] == item.prompt[1]).all()
            assert np.array_equal(item.target, pair[index]["audio_codes"])
        else:
            assert np.array_equal(item.codes, pair[index]["audio_codes"])
    with pytest.raises(AcousticError, match="min_prompt_s"):
        VoicedUtterances([{**rows(1, 3)[0]}], config())


def test_every_epoch_sees_each_utterance_once_and_items_follow_from_the_seed():
    utterances = VoicedUtterances(rows(), config())
    one, same, other = (AcousticSamples(utterances, draw_masked_sample, 100, seed) for seed in (0, 0, 1))
    for start in (0, 8):
        lengths = [int((~one[start + i]["prompt"]).sum()) for i in range(8)]
        assert sorted(lengths) == [12 + i for i in range(8)]
    backwards = [same[n] for n in reversed(range(16))][::-1]
    assert all(np.array_equal(one[n][k], backwards[n][k]) for n in range(16) for k in one[n])
    assert any(one[n]["visible"].shape != other[n]["visible"].shape for n in range(16))


def test_gradients_reach_every_parameter_and_the_loss_is_the_targets_alone():
    model = new_acoustic_model(config(), 0).train()
    samples = AcousticSamples(VoicedUtterances(rows(), model.config), draw_masked_sample, 100, 0)
    batch = collate([samples[n] for n in range(16)])
    model(**batch).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert still == []
    with torch.no_grad():
        before = model(**batch).loss
        hidden_from_it = ~batch["visible"] & ~batch["targets"] & batch["frames"][:, None]
        assert hidden_from_it.any()
        changed = torch.where(hidden_from_it, 0, batch["audio_codes"])
        assert model(**{**batch, "audio_codes": changed}).loss == before  # what is masked is not read
        given = batch["visible"] & batch["frames"][:, None]
        changed = torch.where(given, 0, batch["audio_codes"])
        assert model(**{**batch, "audio_codes": changed}).loss != before


def test_a_batch_equals_its_items_and_padding_changes_nothing():
    model = new_acoustic_model(config(), 0).eval()
    samples = AcousticSamples(VoicedUtterances(rows(), model.config), draw_masked_sample, 100, 0)
    batch = collate([samples[n] for n in range(6)])
    del batch["targets"]
    with torch.no_grad():
        together = model.hidden(**batch)
        for row in range(6):
            alone = collate([samples[row]])
            del alone["targets"]
            length = int(batch["frames"][row].sum())
            assert torch.allclose(model.hidden(**alone)[0], together[row, :length], atol=1e-5)


def test_it_fills_what_it_has_learnt_exactly_and_by_the_voice(trained):
    items = [row["audio_codes"] for row in rows()]
    voices = [item[:, :8] for item in items[2:] + items[:2]]  # of the same speaker
    for settings in (GREEDY, AcousticDecoding(steps=4, temperature=0.1)):
        for item, filled in zip(items, fill(trained, items, voices, settings), strict=True):
            assert np.array_equal(item, filled)
    swapped = fill(trained, items, voices[1:] + voices[:1])  # the other speaker's voice
    assert all(np.array_equal(s[0], i[0]) and not np.array_equal(s, i) for s, i in zip(swapped, items, strict=True))
    scores = book_scores(trained, evaluation_items(VoicedUtterances(rows(4, 9), trained.config), 10, 0))
    assert scores["accuracy/book1"] > 0.9 and scores["loss"] < 0.3


def test_decoding_does_not_depend_on_the_batch_and_follows_the_seed():
    model = new_acoustic_model(config(), 3).eval()
    items, voices = [codes(9 + 6 * n, 0, n) for n in range(4)], [codes(5 + n, 1, n) for n in range(4)]
    drawn = AcousticDecoding(steps=4, fine_steps=2)
    together = fill(model, items, voices, drawn)
    for n in range(4):  # the longest is longer than window_s, so in pieces
        alone = fill_speech(model, [items[n][:1]], [voices[n]], [f"k{n}"], AcousticDecoding(4, 2, batch_size=1))
        assert np.array_equal(alone[0], together[n]) and together[n].shape == items[n].shape
    assert all(np.array_equal(a, b) for a, b in zip(fill(model, items, voices, drawn), together, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(fill(model, items, voices, drawn, 1), together, strict=True))
    two = fill_speech(model, [item[:2] for item in items], voices, list("abcd"), drawn)
    assert all(np.array_equal(a[:2], b[:2]) for a, b in zip(two, items, strict=True))


def test_rounds_keep_as_many_as_the_schedule_says(monkeypatch):
    model, seen = new_acoustic_model(config(), 0).eval(), []
    whole = model.hidden
    monkeypatch.setattr(model, "hidden", lambda **b: seen.append(int((~b["visible"])[0, 1].sum())) or whole(**b))
    fill(model, [codes(20, 0)], [codes(6, 0)], AcousticDecoding(steps=4))
    assert seen[:4] == [20, *(math.floor(20 * math.cos(math.pi / 8 * n)) for n in (1, 2, 3))] and seen[4] == 0


@pytest.mark.parametrize(
    ("given", "voice", "message"),
    [
        (np.zeros((3, 5)), codes(6, 0), "3 of the tokenizer's 3 books"),
        (np.zeros((1, 5)), codes(3, 0), "needs 3 books and 0.4 s"),
        (np.zeros((1, 5)), codes(6, 0)[:2], "a voice of 2 books"),
    ],
)
def test_what_cannot_be_filled_is_refused(given, voice, message):
    with pytest.raises(AcousticError, match=message):
        fill_speech(new_acoustic_model(config(), 0).eval(), [given.astype(np.int64)], [voice], ["k"])


def test_the_unigram_baseline_by_hand():
    item = Item(codes(4, 0), np.array([[0, 1, 2], [3, 3, 0], [1, 1, 1]]))
    found = unigram_scores([np.array([[0, 0], [3, 3], [2, 1]])], [item], config())
    assert found["unigram_accuracy/book1"] == pytest.approx(2 / 3)
    assert found["unigram_loss/book1"] == pytest.approx(-(2 * math.log(3 / 9) + math.log(1 / 9)) / 3)


def test_training_resumes_to_the_same_bits_and_scores_the_valid_split(tmp_path):
    straight = train_acoustic.run(recipe(tmp_path))
    halves = recipe(tmp_path, name="halves")
    stopped = _stop_after(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_acoustic, "TrainerProgress", lambda name: stopped)
        with pytest.raises(KeyboardInterrupt):
            train_acoustic.run(halves)
    resumed = train_acoustic.run(halves)
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    start = new_acoustic_model(load_acoustic_model(straight).config, 0).state_dict()
    assert all(not torch.equal(one[name], start[name]) for name in one)

    def losses(run):
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    assert losses("run") == losses("halves") and [step for step, _ in losses("run")] == [1, 2, 3, 4, 5, 6]
    summary = RunFolder(tmp_path / "run").summary
    assert summary["steps"] == 6 and {"loss", "accuracy/book2", "unigram_accuracy/book2"} <= summary.keys()
    settings = json.loads((straight / "config.json").read_text())
    assert settings["fingerprint"] == FINGERPRINT and settings["codebook_sizes"] == BOOKS
    assert settings["frame_rate"] == 10.0 and settings["tokenizer"] == "tiny" and settings["objective"] == "masked"


def _stop_after(step: int):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    return Stop()


def test_corpora_and_folders_that_do_not_fit_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="corpus: not set"):
        train_acoustic.plan(train_acoustic.Config(str(tmp_path / "x")))
    write_corpus(tmp_path / "one", codebook_sizes=[12, 12])
    with pytest.raises(AcousticError, match="none of 12 utterances"):
        train_acoustic.plan(
            train_acoustic.Config(str(tmp_path / "x"), str(tmp_path / "one"), min_prompt_s=30.0, max_prompt_s=30.0)
        )
    with pytest.raises(AcousticError, match="one book"):
        new_acoustic_model(config(codebook_sizes=[10]), 0)
    model = new_acoustic_model(config(), 0)
    with pytest.raises(AcousticError, match="tokenizer 'tiny'.*10 Hz, 3 books.*the model"):
        model.config.check_fingerprint("0" * 64, "the model")
    with pytest.raises(AcousticError, match="has no config.json"):
        load_acoustic_model(tmp_path)
    for key, value, message in (
        ("objective", "other", "objective 'other'"),
        ("model_type", "lmspt", "no acoustic stage"),
    ):
        folder = tmp_path / key
        model.save_pretrained(folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {key: value}))
        with pytest.raises(AcousticError, match=message):
            load_acoustic_model(folder)
    model.save_pretrained(tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(AcousticError, match="cannot be read"):
        load_acoustic_model(tmp_path / "torn")
