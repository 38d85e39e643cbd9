"""The loss of multi-token heads, what it moves, and resume."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from slm_tiny import tokens_of, utterances
from test_multi_token import fit, plain, plain_losses, samples_of, with_heads
from test_slm_training import KillAt, losses, same_weights

from slm.generation import SpeechLM
from slm.model.lora import LoraSettings, add_lora
from slm.tasks import get_task
from slm.tasks.sequences import IGNORE, answer, make_example
from slm.training.batches import ONE_ROW, pack
from slm.training.multi_token import further_places


@pytest.mark.parametrize(("kind", "books"), [("qwen2", 1), ("llama", 2), ("gemma", 1)])
def test_the_loss_is_that_of_each_answer_alone_packed_or_padded(tmp_path, kind: str, books: int) -> None:
    """Against sums written out: two answers in speech and one in text side by side, and plain text between them."""
    speech_lm = with_heads(plain(books, kind), 3, noise=0.3)
    model, vocabulary, weights = speech_lm.model.eval(), speech_lm.vocabulary, [1.0, 0.5, 2.0, 0.7]
    tokens = tokens_of(vocabulary, speech_lm.text_tokenizer, utterances(3, books=books))
    asked = zip(("tts", "asr", "tts"), tokens, strict=True)
    examples = [make_example(vocabulary, get_task(task), one) for task, one in asked]
    examples.append(answer(np.array([5]), np.array([6, 7, 8])))
    with torch.no_grad():
        each = [plain_losses(speech_lm, example) for example in examples]
    assert each[1][1:] == each[3][1:] == [0, 0] and each[0][1] > 0
    own = [w * sums[0] for w, sums in zip(weights, each, strict=True)]
    wanted = sum(own) + sum(w * 0.6 / 2 * sum(sums[1:]) for w, sums in zip(weights, each, strict=True))
    trainer = fit(tmp_path, copy.deepcopy(speech_lm), steps=1, weight=0.6)
    trainer.model.load_state_dict(model.state_dict())
    for pack_length in (0, 64, ONE_ROW):
        batch = pack(examples, weights, pack_length)
        found = {}
        for training in (True, False):
            trainer.model.train(training)
            with torch.no_grad():
                found[training] = trainer._weighted_sum(trainer.model, batch)[0]
        torch.testing.assert_close(found[True], wanted, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found[False], sum(own), atol=1e-3, rtol=1e-4)
        figures = trainer._further_figures(trainer._beside)
        for distance in (2, 3):
            n_said = sum(weights[i] * (tokens[i].codes.shape[1] * books + 2 - distance) for i in (0, 2))
            total = sum(w * sums[distance - 1] for w, sums in zip(weights, each, strict=True))
            assert figures[f"token_{distance}_loss"] == pytest.approx(float(total) / n_said, rel=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_under_lora_adapters_new_rows_and_heads_move_and_nothing_else(tmp_path, kind: str) -> None:
    """And the loss is that of the whole model, before the first step."""
    speech_lm = with_heads(plain(1, kind), 3, noise=0.3)
    example = make_example(speech_lm.vocabulary, get_task("tts"), samples_of(speech_lm).utterances[0])
    with torch.no_grad():
        wanted = plain_losses(speech_lm, example)
    model = add_lora(speech_lm.model, speech_lm.vocabulary, LoraSettings(rank=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = fit(tmp_path, SpeechLM(model, speech_lm.text_tokenizer, speech_lm.vocabulary))
    after = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    kinds = ("lora_A", "lora_B", "trainable_tokens_delta", "multi_token_heads.modules_to_save")
    assert all(any(kind in name for kind in kinds) for name in moved), moved
    assert all(any(kind in name for name in moved) for kind in kinds)
    assert not any("lora" in name for name in before if "multi_token_heads" in name)
    trainer.model.load_state_dict(before)
    trainer.model.train()
    with torch.no_grad():
        total, _ = trainer._weighted_sum(trainer.model, pack([example], [1.0], 0))
    torch.testing.assert_close(total, wanted[0] + sum(wanted[1:]) / 2, atol=1e-3, rtol=1e-4)


def test_no_head_looks_beyond_an_end() -> None:
    """Two answers end to end, and the stretches of one that is given word by word."""
    vocabulary = plain().vocabulary
    code, end, eos = int(vocabulary.offsets[0]), vocabulary.speech_end_id, vocabulary.end_id
    labels = torch.tensor(
        [[IGNORE, code, code + 1, end, eos, IGNORE, code, end, IGNORE, IGNORE, code, code, code, end]]
    )
    found = {distance: there[0].nonzero()[:, 0].tolist() for distance, there in further_places(labels, vocabulary, 4)}
    assert found == {2: [0, 1, 5, 9, 10, 11], 3: [0, 9, 10], 4: [9]}


def test_heads_and_all_else_learn_and_accumulation_changes_nothing(tmp_path) -> None:
    speech_lm = with_heads(plain(), 3)
    start = copy.deepcopy(speech_lm)
    before = copy.deepcopy(speech_lm.model.state_dict())
    one = fit(tmp_path / "1", speech_lm)
    moved = {name for name, value in one.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before) and sum("multi_token_heads" in name for name in moved) == 2
    many = fit(tmp_path / "3", start, gradient_accumulation=3, gradient_checkpointing=True)
    assert losses(one)[0] > losses(one)[-1]
    assert losses(one) == pytest.approx(losses(many), abs=1e-4)
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path) -> None:
    def fresh() -> SpeechLM:
        return with_heads(plain(), 3)

    whole = fit(tmp_path / "whole", fresh(), gradient_accumulation=2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", fresh(), callbacks=[KillAt(5)], gradient_accumulation=2)
    resumed = fit(tmp_path / "killed", fresh(), gradient_accumulation=2)
    assert same_weights(whole, resumed)
    assert losses(whole)[4:] == losses(resumed)[-2:]
