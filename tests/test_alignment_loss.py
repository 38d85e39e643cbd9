"""The loss and the prior on attention heads: against enumeration, packed against alone, and what they leave alone."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finetuning import finetune_config
from slm_tiny import CODES, tiny_model, tiny_tokenizer, tokens_of, utterances
from test_slm_training import OPTIONS, KillAt, losses, same_weights

from recipes.commands import finetune, train_lm, train_preference
from recipes.config import ConfigError, load_config
from slm.tasks import get_task
from slm.tasks.sequences import Example
from slm.training.alignment.attention_reader import AttentionReader, heads_of
from slm.training.alignment.config import AlignmentConfig
from slm.training.alignment.forward_sum import forward_sum, log_prior
from slm.training.alignment.trainer import (
    alignment_figures,
    alignment_objective,
    attention_to_text,
)
from slm.training.batches import pack
from slm.training.config import TrainingConfig, TrainingError
from slm.training.samples import SpeechSamples
from slm.training.train import train
from slm.vocabulary import add_speech

HEAD = [(1, 0)]


def paths(frames: int, tokens: int) -> list[tuple[int, ...]]:
    """Every way through the tokens: all of them, in order, each for a frame or more."""
    cuts = itertools.combinations(range(1, frames), tokens - 1)
    bounds = ((0, *cut, frames) for cut in cuts)
    return [tuple(t for t in range(tokens) for _ in range(b[t], b[t + 1])) for b in bounds]


def test_the_loss_is_that_of_all_monotonic_paths() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [(1, 1), (4, 1), (3, 3), (6, 2), (7, 4)]
    soft = torch.randn(len(cases), 7, 4, generator=generator).log_softmax(-1)
    frames, tokens = (torch.tensor(column) for column in zip(*cases, strict=True))
    by_hand = []
    for one, (f, t) in zip(soft, cases, strict=True):
        sums = [sum(float(one[frame, token]) for frame, token in enumerate(path)) for path in paths(f, t)]
        by_hand.append(-math.log(sum(map(math.exp, sums))))
    padded = torch.where(torch.arange(7)[None, :, None] < frames[:, None, None], soft, torch.nan)  # padding is not read
    assert forward_sum(soft, frames, tokens).tolist() == pytest.approx(by_hand, abs=1e-5)
    found = forward_sum(padded, frames, tokens)
    assert found.tolist() == pytest.approx(by_hand, abs=1e-5)


def test_the_loss_falls_where_attention_learns_the_diagonal() -> None:
    scores = torch.zeros(1, 12, 4, requires_grad=True)
    frames, tokens = torch.tensor([12]), torch.tensor([4])
    optimizer, before = torch.optim.Adam([scores], 0.3), None
    for _ in range(60):
        loss = forward_sum(scores.log_softmax(-1), frames, tokens).sum()
        before = before or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chosen = scores.argmax(-1)[0]
    assert float(loss.detach()) < 0.2 * before
    assert chosen[0] == 0 and chosen[-1] == 3 and bool((chosen.diff() >= 0).all()) and chosen.unique().numel() == 4


def test_the_prior_is_the_beta_binomial() -> None:
    scipy = pytest.importorskip("scipy.stats")
    found = log_prior(torch.tensor([9, 5]), torch.tensor([4, 1]), longest=9, width=4)
    for frame in range(9):
        wanted = scipy.betabinom(3, frame + 1, 9 - frame).pmf(np.arange(4)) * 4
        assert found[0, frame].exp().tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    assert not found[1].any()  # one token, and padding
    assert found[0].exp().mean(-1).tolist() == pytest.approx([1.0] * 9, rel=1e-4)


def long_samples() -> SpeechSamples:
    """Utterances that have two codes for each token of text, and one that has too few."""
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES])
    tokens = tokens_of(vocabulary, tokenizer, utterances())
    rng, spoken = np.random.default_rng(0), []
    for number, one in enumerate(tokens):
        frames = 2 * len(one.text) + number % 3 if number else len(one.text) - 1
        codes = np.sort(rng.integers(0, CODES, (1, frames)))
        spoken.append(replace(one, codes=codes))
    return SpeechSamples(vocabulary, spoken, {"asr": 1.0, "tts": 1.0})


def examples() -> tuple[SpeechSamples, list[Example]]:
    """ASR, TTS, ASR, TTS, TTS, and TTS with too few codes."""
    samples = long_samples()
    return samples, [samples.example(number, None) for number in (0, 13, 5, 17, 20, 12)]


def test_where_a_text_and_its_codes_are() -> None:
    samples, some = examples()
    vocabulary = samples.vocabulary
    assert [example.spoken is not None for example in some] == [False, True, False, True, True, False]
    for example in (some[1], some[3], some[4]):
        text, speech = example.spoken.text, example.spoken.speech
        ids = example.input_ids
        assert ids[text.stop] == vocabulary.mark_id("<|synthesize|>") and text.start == len(vocabulary.before)
        assert ids[speech.start] == vocabulary.speech_id and ids[speech.stop] != vocabulary.speech_end_id
        assert ids[speech.stop + 1] == vocabulary.speech_end_id
        assert (example.labels[speech.start + 1 : speech.stop + 1] >= vocabulary.offsets[0]).all()
    names = ("asr", "tts", "tts-aligned", "continuation", "st", "mt", "instruct")
    assert [name for name in names if get_task(name).says_its_prompt] == ["tts"]


@pytest.mark.parametrize(("kind", "attention"), [("qwen2", "eager"), ("llama", "sdpa"), ("gemma", "eager")])
@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_packed_reads_as_alone_whatever_attends(kind, attention, strength) -> None:
    """Texts of several sequences in one row, ASR between them; grouped queries; with and without the prior."""
    samples, some = examples()
    model = tiny_model(kind, samples.vocabulary.size)
    model.set_attn_implementation(attention)
    reader = AttentionReader(model, [(0, 1), (1, 0), (1, 1)])
    spoken = [example for example in some if example.spoken is not None]

    def read(batch) -> tuple:
        with reader.reading(batch["spoken"], strength) as reading, torch.no_grad():
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        return alignment_figures(reading)

    packed = pack(some, [1.0] * len(some), pack_length=256)
    assert len(packed["input_ids"]) == 1 and len(packed["spoken"]) == 3
    order = sorted(range(len(some)), key=lambda i: -len(some[i]))
    alone = [read(pack([some[i]], [1.0], pack_length=0)) for i in order if some[i].spoken is not None]
    for got, wanted in zip(read(packed), (torch.cat(parts) for parts in zip(*alone, strict=True)), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    model.set_attn_implementation("eager")
    batch = pack([spoken[0]], [1.0], pack_length=0)
    if not strength:  # transformers' own weights
        weights = model(batch["input_ids"], output_attentions=True).attentions[1][0, 1]
        text, speech = spoken[0].spoken.text, spoken[0].spoken.speech
        own = weights[speech.start : speech.stop, text.start : text.stop]
        torch.testing.assert_close(attention_to_text(model, spoken[0], [(1, 1)])[0], own, atol=1e-5, rtol=1e-4)


def test_the_prior_touches_its_heads_and_positions_alone() -> None:
    samples, some = examples()
    model = tiny_model("qwen2", samples.vocabulary.size)
    batch = pack(some, [1.0] * len(some), pack_length=256)
    attention = model.model.layers[0].self_attn

    def heads(strength: float | None) -> torch.Tensor:
        """What layer 0's heads give, (L, heads, width)."""
        seen = []
        hook = attention.o_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        reader = AttentionReader(model, [(0, 1)])
        with torch.no_grad():
            if strength is None:
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            else:
                with reader.reading(batch["spoken"], strength):
                    model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        hook.remove()
        assert attention.config is model.config and not hasattr(attention, "attention_reader")
        return seen[0][0].unflatten(-1, (2, -1))

    plain, read, changed = heads(None), heads(0.0), heads(2.0)
    assert torch.equal(plain, read)
    assert torch.equal(plain[:, 0], changed[:, 0])
    moved = (plain[:, 1] != changed[:, 1]).any(-1)
    speech = torch.zeros_like(moved)
    for _, _, _, _, first, count in batch["spoken"].tolist():
        speech[first : first + count] = True
    assert torch.equal(moved, speech)


def fit(folder: Path, callbacks=(), alignment=None, **options):
    samples = long_samples()
    model = tiny_model("qwen2", samples.vocabulary.size)
    named = OPTIONS | {"steps": 6, "eval_steps": 6, "save_steps": 2} | options
    config = TrainingConfig(**named, alignment=alignment)
    objective = alignment_objective(alignment)
    return train(model, samples, samples, config, folder, seed=7, callbacks=callbacks, objective=objective)


def test_the_heads_learn_and_what_is_logged(tmp_path) -> None:
    alignment = AlignmentConfig(heads=[(0, 1), (1, 0)], loss_weight=1.0)
    trainer = fit(tmp_path / "on", alignment=alignment, steps=24, eval_steps=12, save_steps=24, learning_rate=1e-2)
    logged = [row for row in trainer.state.log_history if "alignment_loss" in row]
    assert len(logged) > 18 and logged[-1]["alignment_loss"] < 0.7 * logged[0]["alignment_loss"]
    assert logged[-1]["alignment_sharpness"] > logged[0]["alignment_sharpness"]
    valid = [row for row in trainer.state.log_history if "eval_tts_alignment_loss" in row]
    assert len(valid) == 2 and valid[1]["eval_tts_alignment_loss"] < valid[0]["eval_tts_alignment_loss"]
    each = [valid[0][f"eval_tts_alignment_loss_{name}"] for name in ("0_1", "1_0")]
    assert sum(each) / 2 == pytest.approx(valid[0]["eval_tts_alignment_loss"])
    assert not any("asr_alignment" in name for name in valid[0])


def test_measured_alone_it_changes_no_bit(tmp_path) -> None:
    measured = fit(tmp_path / "measured", alignment=AlignmentConfig(layers=[0, 1], loss_weight=0.0))
    plain = fit(tmp_path / "plain")
    assert same_weights(measured, plain) and losses(measured) == losses(plain)
    assert not any("alignment" in name for row in plain.state.log_history for name in row)


def test_accumulation_and_resume(tmp_path) -> None:
    alignment = AlignmentConfig(heads=HEAD, loss_weight=0.5, prior_steps=5)
    one = fit(tmp_path / "1", alignment=alignment)
    many = fit(tmp_path / "3", alignment=alignment, gradient_accumulation=3)
    alone = fit(tmp_path / "rows", alignment=alignment, pack_length=0)
    for other in (many, alone):
        assert losses(one) == pytest.approx(losses(other), abs=1e-4)
        for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-3)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", alignment=alignment, callbacks=[KillAt(5)])
    assert same_weights(one, fit(tmp_path / "killed", alignment=alignment))


def test_which_weights_the_loss_reaches() -> None:
    """Of the layer that is read the rows of the head's query and key; nothing above it; all below."""
    samples, some = examples()
    model = tiny_model("llama", samples.vocabulary.size)
    batch = pack(some, [1.0] * len(some), pack_length=64)
    with AttentionReader(model, HEAD).reading(batch["spoken"]) as reading:
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    alignment_figures(reading)[0].sum().backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    top, head = "model.layers.1.", model.model.layers[1].self_attn.q_proj.weight.grad
    assert {name for name in reached if name.startswith(top)} == {
        f"{top}self_attn.q_proj.weight",
        f"{top}self_attn.k_proj.weight",
        f"{top}input_layernorm.weight",
    }
    assert head[:16].any() and not head[16:].any()
    assert {name for name, _ in model.named_parameters() if ".layers.0." in name} <= reached
    assert "lm_head.weight" not in reached


def test_finetune_draws_and_logs(tmp_path) -> None:
    on = ("training.alignment.heads=[[1,0],[0,1]]", "training.alignment.prior_steps=2")
    config = finetune_config(tmp_path, "on", *on)
    finetune.plan(config)
    folder = finetune.run(config)
    assert [path.name for path in sorted((tmp_path / "on" / "plots").glob("*"))] == [
        "attention-000002.png",
        "attention-000004.png",
    ]
    rows = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    assert all("alignment_sharpness" in row for row in rows if "loss" in row)
    assert any("eval_tts_alignment_sharpness" in row for row in rows)
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("training.alignment.heads=[[2,0]]",), "layer 2, head 0 is none; the model has 2 layers of 2 heads"),
        (("training.alignment.heads=[[0,2]]",), "layer 0, head 2 is none"),
        (("training.alignment.layers=[0]", "task_weights={asr: 1.0}"), "says the text of its prompt; train tts"),
        (("training.alignment.layers=[0]", "n_codebooks=2", "pattern=delay"), "not with pattern=delay"),
    ],
)
def test_a_plan_says_what_cannot_be(tmp_path, overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        finetune.plan(finetune_config(tmp_path, "run", *overrides))


def test_settings_that_say_nothing_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="name heads"):
        AlignmentConfig()
    with pytest.raises(ValueError, match="counted from 0"):
        AlignmentConfig(heads=[(-1, 0)])
    with pytest.raises(ValueError, match="loss_weight"):
        AlignmentConfig(layers=[0], loss_weight=-1.0)
    on = AlignmentConfig(layers=[0])
    with pytest.raises(TrainingError, match="not with deepspeed, fsdp or gradient_checkpointing"):
        TrainingConfig(alignment=on, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="a text LM says nothing"):
        load_config(train_lm.Config, None, ["training.alignment.layers=[0]"])
    with pytest.raises(ConfigError, match="preferences are about whole answers"):
        load_config(train_preference.Config, None, ["training.alignment.layers=[0]"])


def test_another_kind_of_attention_is_noticed(monkeypatch) -> None:
    samples, some = examples()
    model = tiny_model("qwen2", samples.vocabulary.size)
    batch = pack(some, [1.0] * len(some), pack_length=64)
    attention = model.model.layers[1].self_attn
    reader = AttentionReader(model, heads_of(AlignmentConfig(layers=[1]), model))
    own = reader._layers[0].own_attention
    monkeypatch.setattr(reader._layers[0], "own_attention", lambda *a, **k: (own(*a, **k)[0] * 1.5, None))
    with pytest.raises(TrainingError, match="does more than attend by softmax"), reader.reading(batch["spoken"]):
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    assert attention.config is model.config
