"""Sequences, packing and the order of data: pure functions."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from slm_tiny import CODES, tiny_model, tiny_tokenizer, tokens_of, utterances

import slm.tasks.sequences
import slm.training.batches
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import answer, example_length, make_example, make_prompt
from slm.training.batches import PackedBatches, pack, plan_steps
from slm.training.samples import BatchError, MixedSamples, NoiseConfig, SpeechSamples, TextSamples
from slm.vocabulary import SpeechVocabulary, add_speech


def speech_samples(noise: NoiseConfig | None = None, weights: dict | None = None, **options) -> SpeechSamples:
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES, CODES])
    tokens = tokens_of(vocabulary, tokenizer, utterances())
    return SpeechSamples(vocabulary, tokens, weights or {"asr": 1.0, "tts": 1.0}, noise, **options)


@pytest.mark.parametrize("module", [slm.tasks.sequences, slm.training.batches])
def test_docstrings_show_real_batches(module) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("chat", [False, True])
def test_a_chat_example_reads_as_the_template_renders_it(chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat)
    vocabulary = add_speech(tokenizer, [CODES])
    text, codes = vocabulary.encode_text(tokenizer, "lay red"), np.array([[3, 0]])
    examples = (make_example(vocabulary, get_task(name), UtteranceTokens(codes, text)) for name in ("asr", "tts"))
    asr, tts = (tokenizer.decode(item.input_ids, clean_up_tokenization_spaces=False) for item in examples)
    heard = "<|speech|><|speech_0_3|><|speech_0_0|><|/speech|>"
    if chat:
        turns = [("user", f"{heard}<|transcribe|>"), ("assistant", "lay red")]
        messages = [{"role": role, "content": content} for role, content in turns]
        assert asr + "\n" == tokenizer.apply_chat_template(messages, tokenize=False)
        assert tts == f"<|bos|>user\nlay red<|synthesize|><|eos|>\n<|bos|>assistant\n{heard}<|eos|>"
    else:
        assert asr == f"<|bos|>{heard}<|transcribe|>lay red<|eos|>"
        assert tts == f"<|bos|>lay red<|synthesize|>{heard}<|eos|>"


def test_labels_are_the_answer_and_prompts_the_rest() -> None:
    vocabulary = SpeechVocabulary(codebook_sizes=(12, 12), first_id=50, end_id=2, before=(1,), between=(7, 8))
    codes, text = np.array([[1, 2, 3], [4, 5, 6]]), np.array([30, 31])
    asr, tts = get_task("asr"), get_task("tts")
    for task, given in ((asr, UtteranceTokens(codes=codes)), (tts, UtteranceTokens(text=text))):
        example, prompt = (
            make_example(vocabulary, task, UtteranceTokens(codes, text)),
            make_prompt(vocabulary, task, given),
        )
        assert (example.input_ids[: len(prompt)] == prompt).all()
        assert (example.labels[: len(prompt)] == -100).all()
        assert (example.labels[len(prompt) :] == example.input_ids[len(prompt) :]).all()
        assert example.labels[-1] == vocabulary.end_id
        assert len(example) == example_length(vocabulary, task, UtteranceTokens(codes, text))
    assert example.labels[-2] == vocabulary.speech_end_id


def test_pack_length_0_gives_each_sequence_a_row() -> None:
    short, long = (answer(np.array([5]), np.arange(6, 6 + n)) for n in (1, 5))

    def rows(pack_length: int) -> list[list[int]]:
        return sorted(pack([short, short, long], [1.0] * 3, pack_length, numbered=True)["sequences"].tolist())

    assert rows(1) == [[0, 0, 1, 1, -1, -1], [2] * 6]  # as long as the longest, and the short ones share a row
    assert rows(0) == [[0, 0, -1, -1, -1, -1], [1, 1, -1, -1, -1, -1], [2] * 6]


def test_rows_come_in_few_lengths() -> None:
    def length(*tokens: int, pack_length: int = 40) -> int:
        examples = [answer(np.array([5]), np.arange(6, 5 + n)) for n in tokens]
        return pack(examples, [1.0] * len(examples), pack_length)["input_ids"].shape[1]

    assert {length(n) for n in (3, 9, 17)} == {16, 32} and length(33) == 40  # never above pack_length
    assert length(41) == 41 and length(9, pack_length=0) == 9  # the longest alone, and one sequence a row: as they are


def test_packed_logits_equal_the_singles() -> None:
    samples = speech_samples()
    model = tiny_model("qwen2", samples.vocabulary.size)
    examples = [samples.example(i, None) for i in range(9)]
    batch = pack(examples, [1.0] * 9, pack_length=100)
    assert batch["input_ids"].shape[0] > 1 and (batch["position_ids"] == 0).sum() > batch["input_ids"].shape[0]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        seen = 0
        for example in examples:
            row, start = next(
                (r, s)
                for r in range(batch["input_ids"].shape[0])
                for s in (batch["position_ids"][r] == 0).nonzero().flatten().tolist()
                if batch["input_ids"][r, s : s + len(example)].tolist() == example.input_ids.tolist()
            )
            single = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0]
            torch.testing.assert_close(logits[row, start : start + len(example)], single, atol=1e-5, rtol=1e-5)
            seen += 1
    assert seen == 9


def test_plan_is_epochs_on_end_within_the_budget() -> None:
    lengths = np.array([5, 9, 3, 7, 20, 4])
    plan = plan_steps(lengths, 16, 40, seed=3)
    assert [step.tolist() for step in plan] == [step.tolist() for step in plan_steps(lengths, 16, 60, seed=3)[:40]]
    order = np.concatenate(plan)
    for epoch in range(len(order) // 6):
        assert sorted(order[epoch * 6 : epoch * 6 + 6]) == list(range(6))
    assert all(lengths[step].sum() <= 16 or len(step) == 1 for step in plan)
    assert [s.tolist() for s in plan] != [s.tolist() for s in plan_steps(lengths, 16, 40, seed=4)]


def test_micro_batches_share_a_step_out() -> None:
    samples = speech_samples(NoiseConfig(0.2, 0.2))

    def sequences(micro: int, step: int) -> list[list[int]]:
        options = {"steps": 4, "tokens_per_step": 260, "pack_length": 64, "seed": 5}
        batches = PackedBatches(samples, micro_batches=micro, **options)
        found = []
        for item in range(step * micro, step * micro + micro):
            batch = batches[item]
            for ids, positions, weights in zip(
                batch["input_ids"], batch["position_ids"], batch["loss_weights"], strict=True
            ):
                starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
                for a, b in zip(starts, starts[1:], strict=False):
                    if weights[a:b].sum():
                        found.append(ids[a:b].tolist())
        return sorted(found)

    for step in range(4):
        assert sequences(1, step) == sequences(2, step) == sequences(4, step)
    with pytest.raises(BatchError, match="tokens_per_step"):
        PackedBatches(samples, micro_batches=8, steps=2, tokens_per_step=60, pack_length=64, seed=0)


def test_noise_changes_asr_prompts_only() -> None:
    samples = speech_samples(NoiseConfig(replace=0.3, drop=0.3))
    changed = shorter = 0
    for index in range(len(samples.lengths)):
        clean, noisy = samples.example(index, None), samples.example(index, np.random.default_rng(index))
        if samples.tasks[index] == 1:
            assert (clean.input_ids == noisy.input_ids).all()
        changed += clean.input_ids.tolist() != noisy.input_ids.tolist()
        shorter += len(noisy) < len(clean)
        answer = clean.labels[clean.labels != -100].tolist()
        assert noisy.labels[noisy.labels != -100].tolist() == answer
        assert len(noisy) <= samples.lengths[index]
    assert changed >= 6 and shorter >= 3
    codes = np.zeros((1, 2000), dtype=np.int64)
    kept = NoiseConfig(replace=0.0, drop=0.1).apply(codes, [CODES], np.random.default_rng(0)).shape[1]
    assert 0.87 < kept / 2000 < 0.93
    assert (NoiseConfig(0.0, 0.0).apply(codes, [CODES], np.random.default_rng(0)) == codes).all()


def test_task_weights_choose_tasks() -> None:
    only = speech_samples(weights={"asr": 0.0, "tts": 2.0})
    assert set(only.tasks.tolist()) == {1} and only.task_weights == [0.0, 2.0]
    for wrong in ({"asr": 0.0}, {"asr": 1.0, "vc": 1.0}, {"asr": -1.0, "tts": 1.0}):
        with pytest.raises(BatchError, match="task_weights"):
            speech_samples(weights=wrong)
    with pytest.raises(BatchError, match="max_length"):
        speech_samples(max_length=5)
    assert speech_samples(max_length=24).n_too_long > 0


def test_text_samples() -> None:
    example = TextSamples([np.array([5, 6])], bos_id=1, eos_id=2).example(0, None)
    bare = TextSamples([np.array([5, 6])], bos_id=None, eos_id=2).example(0, None)
    assert bare.input_ids.tolist() == [5, 6, 2] and bare.labels.tolist() == [-100, 6, 2]
    assert example.input_ids.tolist() == [1, 5, 6, 2] and example.labels.tolist() == [-100, 5, 6, 2]


def test_kinds_of_samples_are_mixed_as_often_as_is_asked() -> None:
    """Every sample keeps its sequence, its task and its weight; an epoch sees it as often as is asked."""
    speech = speech_samples()
    text = TextSamples([np.array([5] * n) for n in range(3, 13)], 1, 2, weight=0.5, repeat=0.2)
    mixed = MixedSamples([speech, text])
    assert mixed.task_names == ["asr", "tts", "text"] and mixed.task_weights == [1.0, 1.0, 0.5]
    n = len(speech.lengths)
    for index in (0, n - 1):
        assert mixed.example(index, None).input_ids.tolist() == speech.example(index, None).input_ids.tolist()
    for index in (0, 9):
        assert mixed.example(n + index, None).input_ids.tolist() == text.example(index, None).input_ids.tolist()
    assert [len(mixed.example(i, None)) for i in range(n + 10)] == mixed.lengths.tolist()
    plan = plan_steps(mixed.lengths, 260, 600, 0, mixed.repeats)
    seen = np.bincount(np.concatenate(plan), minlength=n + 10)
    assert seen[n:].mean() / seen[:n].mean() == pytest.approx(0.2, rel=0.1)
    assert MixedSamples([speech, TextSamples([np.array([5])], 1, 2)]).repeats is None
