"""Faults that frameworks have had without an error: small models, exact answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from slm_tiny import CODES, FINGERPRINT, metadata, save_llm, tiny_model, tiny_tokenizer, tokens_of, utterances
from test_sequences import speech_samples
from test_slm_training import OPTIONS, KillAt, fit
from torch.nn import functional as F
from transformers import TrainerCallback

from slm.model.lora import LoraSettings, add_lora
from slm.model.modeling import load_llm
from slm.model.speech_rows import extend_with_speech
from slm.tasks import get_task
from slm.tasks.sequences import make_example
from slm.training.batches import PackedBatches
from slm.training.config import TrainingConfig
from slm.training.samples import NoiseConfig, SpeechSamples
from slm.training.train import train
from slm.vocabulary import SpeechVocabulary, add_speech


@pytest.mark.parametrize("n_codebooks", [1, 2])
def test_the_label_of_a_position_is_the_next_token_for_every_book(n_codebooks: int) -> None:
    """A table that predicts `f(token)` is right at j + 1 alone: loss 0 there, above it at j and j + 2."""
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES, CODES], n_codebooks=n_codebooks)
    (utterance,) = tokens_of(vocabulary, tokenizer, utterances(1))
    example = make_example(vocabulary, get_task("tts"), utterance)
    ids, labels = torch.from_numpy(example.input_ids), torch.from_numpy(example.labels)
    books = torch.full((vocabulary.size,), -1)
    for book, offset in enumerate(vocabulary.offsets):
        books[offset : offset + CODES] = book
    perfect = torch.full((len(ids), vocabulary.size), -20.0)
    perfect[torch.arange(len(ids) - 1), ids[1:]] = 20.0  # logits at j know the token at j + 1
    for book in range(n_codebooks):
        found = []
        for shift in (0, 1, 2):
            target = labels[shift:]
            logits = perfect[: len(target)]
            mine = (target >= 0) & (books[target.clamp_min(0)] == book)
            assert mine.any()
            found.append(float(F.cross_entropy(logits[mine], target[mine])))
        assert found[1] < 1e-6 < min(found[0], found[2]), f"book {book}: {found}"


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_after_a_step_all_that_trains_has_moved_and_nothing_else(tmp_path, kind: str, lora: bool) -> None:
    """Each book's rows that the step saw too; rows of ids that no sequence holds stay under LoRA's zero decay."""
    model, tokenizer, _ = load_llm(str(save_llm(tmp_path / "llm", kind)))
    vocabulary = add_speech(tokenizer, [CODES, CODES], n_codebooks=2, fingerprint=FINGERPRINT)
    extend_with_speech(model, vocabulary, seed=0)
    if lora:
        model = add_lora(model, vocabulary, LoraSettings(rank=2))
    # An adapter's second matrix begins at 0, so that the first one moves from the second step on.
    samples = SpeechSamples(vocabulary, tokens_of(vocabulary, tokenizer, utterances()), {"asr": 1.0, "tts": 1.0})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainingConfig(**OPTIONS | {"steps": 2, "eval_steps": 0, "warmup_steps": 0, "weight_decay": 0.0})
    train(model, samples, None, config, tmp_path / "checkpoints", seed=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name
    if not lora:
        table, old = model.get_input_embeddings().weight, before["model.embed_tokens.weight"]
        for book, offset in enumerate(vocabulary.offsets):
            used = {int(code) for u in utterances() for code in u["audio_codes"][book]}
            moved = {code for code in range(CODES) if not torch.equal(table[offset + code], old[offset + code])}
            assert used <= moved, f"book {book}"


def test_the_order_of_keys_changes_nothing(tmp_path) -> None:
    """A vocabulary and task weights written in another order: the same vocabulary, ids and losses."""
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT)
    vocabulary.save(tmp_path)
    file = tmp_path / "speech_vocabulary.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(values.items()))))
    assert SpeechVocabulary.load(tmp_path, tokenizer) == vocabulary
    one, other = (
        speech_samples(NoiseConfig(0.1, 0.1), weights)
        for weights in ({"asr": 2.0, "tts": 1.0}, {"tts": 1.0, "asr": 2.0})
    )
    settings = dict(steps=3, tokens_per_step=260, micro_batches=2, pack_length=64, seed=3)
    for a, b in zip(PackedBatches(one, **settings), PackedBatches(other, **settings), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    losses = []
    for name, samples in (("one", one), ("other", other)):
        model = tiny_model("qwen2", samples.vocabulary.size)
        config = TrainingConfig(**OPTIONS | {"steps": 2, "eval_steps": 0, "log_steps": 1})
        trainer = train(model, samples, None, config, tmp_path / name, seed=0)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert metadata().as_dict() == metadata(**dict(reversed(metadata().as_dict().items()))).as_dict()


def test_the_ids_consumed_are_those_of_the_unbroken_run(tmp_path) -> None:
    """Killed between two saves, in the second epoch, with accumulation 3."""

    class Consumed(TrainerCallback):
        def __init__(self) -> None:
            self.steps: dict[int, list[int]] = {}
            self.now = 0

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            self.now = state.global_step

    def run(folder, *callbacks):
        seen = Consumed()
        real = PackedBatches.__getitem__

        def item(self, index):
            batch = real(self, index)
            seen.steps[index] = batch["input_ids"].flatten().tolist()
            return batch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PackedBatches, "__getitem__", item)
            try:
                fit(folder, [seen, *callbacks], steps=9, save_steps=2, gradient_accumulation=3, tokens_per_step=200)
            except KeyboardInterrupt:
                pass
        return seen.steps

    whole = run(tmp_path / "whole")
    lengths = speech_samples().lengths.sum()
    assert sum(map(len, whole.values())) > 1.6 * lengths
    killed = run(tmp_path / "killed", KillAt(7))
    resumed = run(tmp_path / "killed")
    assert max(killed) < max(whole) and min(resumed) >= 3 * 6 - 3  # goes on behind step 6, nothing before it is read
    assert all(whole[index] == ids for part in (killed, resumed) for index, ids in part.items())
    assert killed.keys() | resumed.keys() == whole.keys()


def test_validation_twice_is_equal(tmp_path) -> None:
    """Noise and dropout are off in it, and it moves no random stream."""
    trainer = fit(tmp_path, steps=2, valid=True, eval_steps=2)
    trainer.model.config.attention_dropout = 0.5
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    state = torch.get_rng_state()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
def test_text_is_read_as_before_once_speech_is_added(tmp_path, kind: str) -> None:
    """The same ids, the same bits of hidden states; logits up to rounding, a wider head being multiplied in blocks."""
    model, tokenizer, _ = load_llm(str(save_llm(tmp_path / "llm", kind)))
    plain, n_text = tiny_tokenizer(), len(tokenizer)
    rng = np.random.default_rng(0)
    words = sorted({word for row in utterances() for word in row["text"].split()})
    prompts = [" ".join(rng.choice(words, 5)) for _ in range(20)]

    def read() -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.no_grad():
            outputs = [model.eval()(torch.tensor([plain(p)["input_ids"]]), output_hidden_states=True) for p in prompts]
        return [(output.hidden_states[-1], output.logits[..., :n_text]) for output in outputs]

    before = read()
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT)
    extend_with_speech(model, vocabulary, seed=0)
    assert [tokenizer(p)["input_ids"] for p in prompts] == [plain(p)["input_ids"] for p in prompts]
    for (states, logits), (own_states, own_logits) in zip(before, read(), strict=True):
        assert torch.equal(states, own_states)
        torch.testing.assert_close(own_logits, logits, rtol=0, atol=1e-4 * float(logits.abs().max()))
