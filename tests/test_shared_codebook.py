"""The codebook that speech and text share: its loss, the pairs of a packed batch, gradients, and a training with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finetuning import finetune_config
from slm_tiny import CODES, tiny_model, tiny_tokenizer, tokens_of, utterances
from test_slm_training import KillAt, losses, same_weights

from recipes.commands import finetune
from slm.training.batches import pack
from slm.training.config import TrainingConfig, TrainingError
from slm.training.samples import SpeechSamples
from slm.training.shared_codebook.codebook import SharedCodebook, agreement, alignment_loss
from slm.training.shared_codebook.config import SharedCodebookConfig
from slm.training.shared_codebook.pairs import layer_states, pairs_of, speech_states, text_states
from slm.training.shared_codebook.trainer import NAME, shared_codebook_objective
from slm.training.train import train
from slm.vocabulary import add_speech

SHARED = SharedCodebookConfig(layer=1, slots=3, entries=8)


def samples() -> SpeechSamples:
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES])
    return SpeechSamples(vocabulary, tokens_of(vocabulary, tokenizer, utterances()), {"asr": 1.0, "tts": 1.0})


def one_hot(*rows: list[int], entries: int = 4) -> torch.Tensor:
    """Log probabilities (N, M, V) of sure units."""
    return torch.nn.functional.one_hot(torch.tensor(rows), entries).float().clamp_min(1e-6).log()


def test_the_loss_is_least_where_pairs_agree_and_differ_from_each_other():
    apart, same = one_hot([0, 1], [2, 3]), one_hot([0, 1], [0, 1])
    swapped = one_hot([2, 3], [0, 1])
    even = torch.full((2, 2, 4), 0.25).log()
    for speech, text, loss, matched in (
        (apart, apart, 0.0, 1.0),
        (same, same, 0.693, 0.0),  # one unit for all agrees and tells nothing: log 2 pairs, no better than chance
        (even, even, 0.693, 0.0),
    ):
        found = alignment_loss(speech, text)
        assert found[0].tolist() == pytest.approx([loss] * 2, abs=1e-3) and found[1].tolist() == [matched] * 2
    assert (alignment_loss(apart, swapped)[0] > 10).all()
    assert agreement(apart, apart).tolist() == [1, 1] and agreement(apart, swapped).tolist() == [0, 0]


def test_padding_and_length_change_nothing():
    torch.manual_seed(0)
    codebook, states = SharedCodebook(8, 3, 5), torch.randn(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    together = codebook(states, mask)
    assert together.shape == (2, 3, 5) and torch.allclose(together.exp().sum(-1), torch.ones(2, 3))
    alone = codebook(states[1:, :4], mask[1:, :4])
    assert torch.allclose(together[1:], alone, atol=1e-5)
    assert torch.allclose(codebook(states.masked_fill(~mask[..., None], 7.0), mask), together, atol=1e-5)


def test_pairs_are_the_recordings_and_texts_of_asr_wherever_they_are_packed():
    drawn = samples()
    vocabulary, numbers = drawn.vocabulary, (0, 13, 5, 17, 2)  # ASR, TTS, ASR, TTS, ASR
    examples = [drawn.example(number, None) for number in numbers]
    for pack_length in (0, 128):
        batch = pack(examples, [1.0] * 5, pack_length)
        pairs = pairs_of(batch, vocabulary)
        assert len(pairs) == 3
        found = {
            (tuple(batch["input_ids"][p.row, p.speech.start : p.speech.stop].tolist()), tuple(p.text.tolist()))
            for p in pairs
        }
        wanted = set()
        for number in (0, 5, 2):
            example = drawn.example(number, None)
            ids, answer = example.input_ids.tolist(), [i for i in example.labels.tolist() if i != -100]
            codes = ids[ids.index(vocabulary.speech_id) + 1 : ids.index(vocabulary.speech_end_id)]
            wanted.add((tuple(codes), tuple(answer[:-1])))
        assert found == wanted


def test_gradients_reach_both_sides_and_packing_changes_no_state():
    drawn, model = samples(), tiny_model("qwen2", 200).train()
    vocabulary = drawn.vocabulary
    model.resize_token_embeddings(vocabulary.size)
    examples = [drawn.example(number, None) for number in (0, 5)]
    found = {}
    for pack_length in (0, 256):
        batch = pack(examples, [1.0, 1.0], pack_length)
        pairs = sorted(pairs_of(batch, vocabulary), key=lambda pair: len(pair.text))
        with layer_states(model, 1) as states:
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        found[pack_length] = speech_states(states[0], pairs)[0]
    assert torch.allclose(found[0], found[256], atol=1e-4)
    codebook = SharedCodebook(model.config.hidden_size, 3, 8)
    speech = codebook(*speech_states(states[0], pairs))
    text = codebook(*text_states(model, vocabulary, pairs, 1))
    table = model.get_input_embeddings().weight
    for side, own in ((speech, pairs[0].speech), (text, None)):
        model.zero_grad(), codebook.zero_grad()
        alignment_loss(*((side, text.detach()) if own else (speech.detach(), side)))[0].sum().backward(
            retain_graph=True
        )
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codebook.parameters())
        used = table.grad.abs().sum(1)
        assert (used[int(vocabulary.offsets[0]) :].sum() > 0) == (own is not None)
        assert (used[pairs[0].text].sum() > 0) == (own is None)
    with pytest.raises(TrainingError, match=r"shared_codebook.layer: 99, and the model has \d layers"):
        with layer_states(model, 99):
            pass


def trained(folder: Path, model, drawn: SpeechSamples, steps: int = 30, callbacks=(), **changes):
    values = {"steps": steps, "tokens_per_step": 256, "pack_length": 128, "learning_rate": 3e-3, "log_steps": 5}
    values |= {"warmup_steps": 1, "eval_steps": 0, "save_steps": 10, "shared_codebook": SHARED}
    objective = shared_codebook_objective(drawn.vocabulary, SHARED)
    config = TrainingConfig(**(values | changes))
    return train(model, drawn, None, config, folder, objective=objective, callbacks=callbacks)


def test_a_tiny_overfit_agrees_and_leaves_no_codebook_in_the_model(tmp_path):
    drawn = samples()
    model = tiny_model("qwen2", drawn.vocabulary.size)
    names = set(model.state_dict())
    trainer = trained(tmp_path, model, drawn, 60)
    told = [line for line in trainer.state.log_history if "loss" in line]
    first, last = ({name: line[f"shared_codebook_{name}"] for name in ("loss", "matched", "agreement")}
                   for line in (told[0], told[-1]))  # fmt: skip
    # Collapsed, the loss would be log N; several recordings of one sentence lie in a batch, so not all find their own.
    assert last["loss"] < 0.5 * first["loss"] and last["matched"] > first["matched"] + 0.2, (first, last)
    assert last["agreement"] > 0.5, (first, last)
    assert set(model.state_dict()) == names and not hasattr(model, NAME)


def test_a_resumed_training_equals_one_without_a_break(tmp_path):
    drawn = samples()
    whole = trained(tmp_path / "whole", tiny_model("qwen2", drawn.vocabulary.size), drawn, 20)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "halves", tiny_model("qwen2", drawn.vocabulary.size), drawn, 20, callbacks=[KillAt(12)])
    again = trained(tmp_path / "halves", tiny_model("qwen2", drawn.vocabulary.size), drawn, 20)
    assert same_weights(whole, again) and losses(whole)[-1:] == losses(again)[-1:]


def test_what_it_cannot_do_is_refused_by_key(tmp_path):
    for changes, message in (
        ({"layer": 0}, "layer: 0 must be at least 1"),
        ({"entries": 1}, "entries: 1 must be at least 2"),
        ({"loss_weight": 0.0}, "loss_weight: 0 must be above 0"),
    ):
        with pytest.raises(ValueError, match=f"shared_codebook.{message}"):
            SharedCodebookConfig(**changes)
    for words, message in (
        (["task_weights={tts: 1}"], "shared_codebook: its pairs are the recordings and texts of task asr"),
        (["training.multi_token.tokens=2"], "shared_codebook: not with training.multi_token"),
        (["pattern=delay", "n_codebooks=2"], "shared_codebook: not with pattern=delay"),
    ):
        with pytest.raises(TrainingError, match=message):
            finetune.plan(finetune_config(tmp_path, "run", "training.shared_codebook.layer=1", *words))
    with pytest.raises(ValueError, match="shared_codebook: trained in full"):
        finetune_config(tmp_path, "run", "training.shared_codebook.layer=1", "lora.rank=4")
