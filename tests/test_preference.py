"""DPO and GRPO on tiny models: the losses by hand, what learns and what does not, rewards that rise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from slm_tiny import CODES, FINGERPRINT, tiny_model, tiny_tokenizer
from torch import nn

from slm.generation import SpeechLM, generate_speech
from slm.model.lora import LoraSettings, add_lora
from slm.model.speech_rows import extend_with_speech
from slm.settings import SpeechLimits, SynthesizeSettings
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import answer, make_prompt
from slm.training.answer_loss import AnswerLoss
from slm.training.batches import pack
from slm.training.config import TrainingConfig, TrainingError
from slm.training.preference.dpo import Pair, PairBatches, PairSamples, dpo_objective
from slm.training.preference.grpo import Drawn, GRPOTrainer, PromptSamples, grpo_objective
from slm.training.preference.losses import clipped_policy_loss, dpo_loss, group_advantages, kl_estimate
from slm.training.preference.reference import Reference, Scorer, answer_log_probabilities
from slm.training.samples import BatchError
from slm.training.train import train
from slm.training.trainer import bare_model
from slm.vocabulary import add_speech

TEXTS = ["bin blue at f two now", "lay red by a nine please", "set white in z four soon"]


def tiny_slm(kind: str = "qwen2") -> SpeechLM:
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, len(tokenizer))
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT, tokenizer="tiny", normaliser="basic")
    extend_with_speech(model, vocabulary, seed=0)
    return SpeechLM(model, tokenizer, vocabulary)


def prompt_of(slm: SpeechLM, text: str) -> np.ndarray:
    ids = slm.vocabulary.encode_text(slm.text_tokenizer, text)
    return make_prompt(slm.vocabulary, get_task("tts"), UtteranceTokens(text=ids))


def example_of(slm: SpeechLM, text: str, codes: list[int]):
    ids = slm.vocabulary.ids_from_codes(np.array([codes]))
    return answer(prompt_of(slm, text), np.array([*ids, slm.vocabulary.speech_end_id], dtype=np.int64))


def by_hand(model: nn.Module, example) -> float:
    """The log-probability of an answer, of the whole logits of its sequence alone."""
    ids = torch.from_numpy(example.input_ids)
    with torch.no_grad():
        scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    places = np.flatnonzero(example.labels >= 0)
    return float(sum(scores[place - 1, ids[place]] for place in places))


def make_pairs(slm: SpeechLM, n: int = 6) -> list[Pair]:
    pairs = []
    for i in range(n):
        chosen = example_of(slm, TEXTS[i % 3], [1, 2, 3, 4 + i % 3])
        rejected = example_of(slm, TEXTS[i % 3], [7, 8, 9, 10, 7 + i % 3, 11])
        pairs.append(Pair(chosen, rejected, by_hand(slm.model, chosen), by_hand(slm.model, rejected)))
    return pairs


def options(**changes) -> TrainingConfig:
    settings = {"steps": 4, "tokens_per_step": 100, "pack_length": 64, "learning_rate": 3e-3, "warmup_steps": 1}
    settings |= {"log_steps": 1, "eval_steps": 0, "save_steps": 2, "schedule": "constant"}
    return TrainingConfig(**settings | changes)


def test_dpo_loss_is_equation_7() -> None:
    chosen, rejected = torch.tensor([-5.0, -2.0]), torch.tensor([-4.0, -9.0])
    losses, margins = dpo_loss(chosen, rejected, torch.tensor([-6.0, -2.0]), torch.tensor([-3.0, -9.0]), beta=0.5)
    # 0.5 * ((-5 + 6) - (-4 + 3)) = 1; the second pair is as it was, where the loss is ln 2
    assert margins.tolist() == [1.0, 0.0]
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])


def test_advantages_are_those_of_a_group_and_zero_where_all_is_worth_the_same() -> None:
    assert group_advantages([1.0, 3.0]).tolist() == [-1.0, 1.0]
    found = group_advantages([0.1, -0.4, 0.7, 0.2])
    assert found.mean() == pytest.approx(0) and found.std() == pytest.approx(1) and found.argmax() == 2
    # 0.1 three times has a mean that is not 0.1 in floating point
    assert group_advantages([0.1] * 3).tolist() == [0.0] * 3


def test_the_policy_loss_is_clipped_on_the_side_that_is_gained_from() -> None:
    ratios, advantages = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]), torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    losses, clipped = clipped_policy_loss(ratios.log(), torch.zeros(5), advantages, clip=0.2)
    assert losses.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8, -2.2])
    assert clipped.tolist() == [True, False, False, True, False]


def test_the_kl_estimate_is_unbiased_and_never_negative() -> None:
    policy, other = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    estimates = kl_estimate(policy.log(), other.log())
    assert bool((estimates >= 0).all())
    assert float((policy * estimates).sum()) == pytest.approx(float((policy * (policy / other).log()).sum()), abs=1e-6)


@pytest.mark.parametrize("through_head", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_log_probabilities_of_packed_answers_are_those_of_each_alone(kind, through_head, monkeypatch) -> None:
    """Also in chunks of a few tokens, and with the gradient of the whole logits."""
    monkeypatch.setattr("slm.training.answer_loss.CHUNK_ELEMENTS", 1000)
    slm = tiny_slm(kind)
    examples = [example_of(slm, TEXTS[i], list(range(2 + 3 * i))) for i in range(3)]
    batch = pack(examples, [1.0] * 3, 64, numbered=True)
    loss = AnswerLoss.of(slm.model, slm.model)
    assert loss is not None and loss.rows * 7 > 1000  # more than one chunk
    values, sequences = answer_log_probabilities(slm.model, batch, loss if through_head else None)
    sums = torch.zeros(3).index_add(0, sequences, values)
    assert sums.tolist() == pytest.approx([by_hand(slm.model, example) for example in examples], abs=1e-4)
    (values * torch.linspace(0.5, 2, len(values))).sum().backward()
    found = {name: p.grad.clone() for name, p in slm.model.named_parameters()}
    slm.model.zero_grad()
    plain, _ = answer_log_probabilities(slm.model, batch, None)
    (plain * torch.linspace(0.5, 2, len(plain))).sum().backward()
    for name, parameter in slm.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    colder, _ = answer_log_probabilities(slm.model, batch, loss if through_head else None, temperature=0.5)
    assert not torch.allclose(colder, plain)


def test_batches_of_pairs_hold_whole_pairs_in_order() -> None:
    slm = tiny_slm()
    pairs = make_pairs(slm)
    sizes = {"steps": 3, "tokens_per_step": 120, "micro_batches": 2, "pack_length": 64, "seed": 0}
    batches = PairBatches(PairSamples(pairs), **sizes)
    assert len(batches) == 6
    for item in range(len(batches)):
        batch = batches[item]
        assert int(batch["sequences"].max()) + 1 == 2 * len(batch["reference"])
        step, micro = divmod(item, 2)
        members = batches.plan[step][batches.places(step, micro)]
        for place, member in enumerate(members):
            for side, example in enumerate((pairs[member].chosen, pairs[member].rejected)):
                mine = batch["sequences"] == 2 * place + side
                assert batch["input_ids"][mine].tolist() == example.input_ids.tolist()
            expected = (pairs[member].reference_chosen, pairs[member].reference_rejected)
            assert batch["reference"][place].tolist() == pytest.approx(expected)
        assert int(batch["chosen_tokens"]) == sum(int((pairs[m].chosen.labels >= 0).sum()) for m in members)
    with pytest.raises(BatchError, match="tokens_per_step"):
        PairBatches(PairSamples(pairs), **sizes | {"tokens_per_step": 40, "micro_batches": 4})


def test_the_margin_of_pairs_grows_in_a_few_steps(tmp_path) -> None:
    """From ln 2 at the start, whatever the accumulation; the figures stand beside the loss."""
    logs = {}
    for accumulation in (1, 2):
        slm = tiny_slm()
        pairs = make_pairs(slm)
        config = options(steps=8, tokens_per_step=260, gradient_accumulation=accumulation)
        folder, objective = tmp_path / str(accumulation), dpo_objective(0.2)
        trainer = train(slm.model, PairSamples(pairs), None, config, folder, objective=objective)
        logs[accumulation] = [row for row in trainer.state.log_history if "loss" in row]
        margins = [by_hand(slm.model, p.chosen) - by_hand(slm.model, p.rejected) for p in pairs]
        before = [pair.reference_chosen - pair.reference_rejected for pair in pairs]
        assert all(now > then + 1 for now, then in zip(margins, before, strict=True))
    first, last = logs[1][0], logs[1][-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and first["reward_margin"] == pytest.approx(
        0, abs=1e-3
    )
    assert last["loss"] < 0.6 and last["reward_accuracy"] == 1.0
    assert last["reward_margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], abs=1e-5)
    assert [row["loss"] for row in logs[2]] == pytest.approx([row["loss"] for row in logs[1]], abs=1e-4)


def test_the_sft_term_is_the_mean_loss_of_chosen_tokens(tmp_path) -> None:
    slm = tiny_slm()
    pairs = make_pairs(slm)
    n_tokens = sum(int((pair.chosen.labels >= 0).sum()) for pair in pairs)
    expected = math.log(2) - 0.5 * sum(pair.reference_chosen for pair in pairs) / n_tokens
    whole = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    config = options(steps=1, tokens_per_step=whole, gradient_accumulation=2)
    batches = PairBatches(PairSamples(pairs), steps=1, tokens_per_step=whole, micro_batches=2, pack_length=64, seed=0)
    assert sorted(batches.plan[0].tolist()) == list(range(6))
    trainer = train(slm.model, PairSamples(pairs), None, config, tmp_path, objective=dpo_objective(0.1, sft_weight=0.5))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-3)


def test_only_what_is_trained_changes_and_the_start_is_the_model_without_adapters(tmp_path) -> None:
    slm = tiny_slm()
    pairs = make_pairs(slm)
    model = add_lora(slm.model, slm.vocabulary, LoraSettings(rank=4, dropout=0.3))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    learnt = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = train(model, PairSamples(pairs), None, options(steps=3), tmp_path, objective=dpo_objective(0.2))
    # Dropout is off, or the loss would not begin at ln 2.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items()) and len(frozen) > 10
    assert all(not torch.equal(after[name], value) for name, value in learnt.items()) and learnt
    batch = pack([pairs[0].chosen, pairs[0].rejected], [1.0, 1.0], 64, numbered=True)
    with Reference(lambda: pytest.fail("there is no need of a second model"), "cpu", "fp32").scorer(model) as start:
        values, sequences = start.log_probabilities(batch)
        sums = torch.zeros(2).index_add(0, sequences, values).tolist()
        assert sums == pytest.approx([pairs[0].reference_chosen, pairs[0].reference_rejected], abs=1e-4)
    moved, sequences = Scorer(model, "cpu", "fp32").log_probabilities(batch)
    assert torch.zeros(2).index_add(0, sequences, moved).tolist() != pytest.approx(sums, abs=1e-2)
    assert all(p.requires_grad == (name in learnt) for name, p in model.named_parameters())


def test_a_start_is_in_memory_only_while_it_is_asked_unless_it_is_kept() -> None:
    slm, loaded = tiny_slm(), []

    def load() -> nn.Module:
        loaded.append(tiny_slm().model)
        return loaded[-1]

    example = example_of(slm, TEXTS[0], [1, 2, 3])
    batch = pack([example], [1.0], 0, numbered=True)
    for keep, times in ((False, 2), (True, 1)):
        loaded.clear()
        reference = Reference(load, "cpu", "fp32", keep)
        for _ in range(2):
            with reference.scorer(slm.model) as start:
                assert float(start.log_probabilities(batch)[0].sum()) == pytest.approx(
                    by_hand(slm.model, example), 1e-5
                )
        assert len(loaded) == times


def letters_reward(codes: np.ndarray) -> float:
    """How many of the first six frames are code 3."""
    return float((codes[0, :6] == 3).mean()) if codes.size else 0.0


def make_rollout(slm: SpeechLM, size: int = 8, reward=letters_reward, seen: list | None = None):
    """Draws answers of six frames by the trained model, worth what `reward` says."""
    settings = SynthesizeSettings(temperature=1.0, top_k=0, loop_s=0)

    def rollout(model: nn.Module, step: int, numbers: np.ndarray) -> list[list[Drawn]]:
        assert not model.training
        if seen is not None:
            seen.append((step, numbers.tolist()))
        speaking = SpeechLM(bare_model(model), slm.text_tokenizer, slm.vocabulary)
        groups = []
        for number in numbers:
            ids = slm.vocabulary.encode_text(slm.text_tokenizer, TEXTS[number])
            asked = [UtteranceTokens(text=ids)] * size
            keys = [f"{number} {step} {sample}" for sample in range(size)]
            limits = [SpeechLimits(0.5, 0.4)] * size
            outputs = generate_speech(speaking, get_task("tts"), asked, limits, settings, keys)
            groups.append([])
            for output in outputs:
                ids_of = [*slm.vocabulary.ids_from_codes(output.codes)]
                ids_of += [slm.vocabulary.speech_end_id] if output.finish_reason == "stop" else []
                example = answer(prompt_of(slm, TEXTS[number]), np.array(ids_of, dtype=np.int64))
                groups[-1].append(Drawn(example, reward(output.codes)))
        return groups

    return rollout


def train_groups(slm: SpeechLM, folder: Path, config: TrainingConfig, model=None, size: int = 8, **changes):
    settings = {"clip": 0.2, "kl_weight": 0.01, "updates": 1, "temperature": 1.0}
    settings |= {name: changes.pop(name) for name in list(changes) if name in settings}
    reference = Reference(lambda: tiny_slm().model, "cpu", "fp32", keep=True)
    samples = PromptSamples([prompt_of(slm, text) for text in TEXTS], [7] * 3, size)
    objective = grpo_objective(make_rollout(slm, size, **changes), reference, **settings)
    return train(slm.model if model is None else model, samples, None, config, folder, objective=objective)


def test_grpo_raises_a_reward_that_can_be_checked(tmp_path) -> None:
    slm = tiny_slm()
    trainer = train_groups(slm, tmp_path, options(steps=30, tokens_per_step=500, learning_rate=5e-3, save_steps=100))
    rows = [row for row in trainer.state.log_history if "reward" in row]
    first, last = (np.mean([row["reward"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert first < 0.25 and last > first + 0.4, (first, last)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] > 0.01
    assert all(row["clipped"] == 0 for row in rows)  # one update: the ratio is 1


def test_answers_that_are_all_worth_the_same_teach_nothing(tmp_path) -> None:
    slm = tiny_slm()
    before = {name: p.clone() for name, p in slm.model.named_parameters()}
    config = options(steps=2, tokens_per_step=300)
    config.weight_decay = 0.0
    trainer = train_groups(slm, tmp_path, config, reward=lambda codes: 0.7, kl_weight=0.0)
    assert all(torch.equal(before[name], p) for name, p in slm.model.named_parameters())
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["loss"] == 0 and row["groups_of_one_reward"] == 1 for row in rows)


def test_several_updates_learn_from_the_same_answers(tmp_path) -> None:
    slm, seen = tiny_slm(), []
    config = options(steps=6, tokens_per_step=400, learning_rate=1e-2, save_steps=3, gradient_accumulation=2)
    trainer = train_groups(slm, tmp_path, config, updates=3, kl_weight=0.0, seen=seen)
    assert [step for step, _ in seen] == [0, 3] and all(len(numbers) >= 2 for _, numbers in seen)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["clipped"] == 0 and rows[2]["clipped"] > 0


def test_a_step_whose_answers_are_gone_is_an_error_not_an_empty_step() -> None:
    trainer = object.__new__(GRPOTrainer)
    trainer.updates, trainer._drawn = 2, []
    trainer.state = type("State", (), {"global_step": 3})()
    with pytest.raises(TrainingError, match="multiples of 2"):
        trainer.get_batch_samples(iter([]), 0, torch.device("cpu"))


@pytest.mark.parametrize("method", ["dpo", "grpo", "grpo-lora"])
def test_a_resumed_training_is_an_unbroken_one(method, tmp_path) -> None:
    """Four steps at once; two, a new process so to speak, and two more: the same weights to the bit."""

    def trained(folder: Path, steps: int) -> dict[str, torch.Tensor]:
        slm = tiny_slm()
        config = options(steps=steps, tokens_per_step=300, gradient_accumulation=2 if method == "dpo" else 1)
        if method == "dpo":
            train(slm.model, PairSamples(make_pairs(slm)), None, config, folder, objective=dpo_objective(0.2, 0.1))
            return {name: p.detach().clone() for name, p in slm.model.named_parameters()}
        torch.manual_seed(0)
        model = add_lora(slm.model, slm.vocabulary, LoraSettings(rank=2)) if "lora" in method else slm.model
        train_groups(slm, folder, config, model, size=4)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    whole = trained(tmp_path / "whole", 4)
    half = trained(tmp_path / "broken", 2)
    again = trained(tmp_path / "broken", 4)
    assert all(torch.equal(whole[name], value) for name, value in again.items())
    assert any(not torch.equal(whole[name], value) for name, value in half.items())
