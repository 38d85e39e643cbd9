"""Prompts that take the places of answers that have ended: each answer is the one that its prompt has alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from slm_scripted import scripted
from slm_tiny import CODES, DEEP, SIZES, opinionated, tiny_model, tiny_tokenizer
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from slm.decoding import attention_cache
from slm.decoding.batching import Waiting
from slm.decoding.decode import decode
from slm.decoding.row_rules import Answer, Grammar, RowLimits
from slm.decoding.running_batch import RunningBatch
from slm.generation import SpeechLM, generate_speech, transcribe_codes
from slm.model.speech_rows import extend_with_speech
from slm.settings import SpeechLimits, SynthesizeSettings, TranscribeSettings
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.vocabulary import add_speech

TEXTS = [
    "bin blue at f two now",
    "lay",
    "set white in z four soon please again and again",
    "place green",
    "red",
    "bin red by a nine",
    "lay blue with k one again then now",
    "in z",
    "white",
]


@pytest.fixture
def joins(monkeypatch) -> Iterator[list[tuple[list[int], int]]]:
    """Of each time that rows came to others: how many ids each row's answer had then, and the batch's width."""
    found, join = [], RunningBatch.join

    def watched(batch: RunningBatch, other: RunningBatch) -> None:
        join(batch, other)
        found.append((batch.legal.done(batch.ids), batch.ids.shape[1]))

    monkeypatch.setattr(RunningBatch, "join", watched)
    yield found


def alone_and_together(speech_lm: SpeechLM, settings: SynthesizeSettings, limits: list[SpeechLimits]) -> list[list]:
    """The codes of TEXTS, and why they ended: three at a time, and one at a time."""
    asked = [UtteranceTokens(text=speech_lm.vocabulary.encode_text(speech_lm.text_tokenizer, text)) for text in TEXTS]
    found = []
    for batch_size in (3, 1):
        own = dataclasses.replace(settings, batch_size=batch_size)
        outputs = generate_speech(speech_lm, get_task("tts"), asked, limits, own)
        found.append([(one.codes.tolist(), one.finish_reason) for one in outputs])
    return found


def speaker(n_codebooks: int, pattern: str) -> SpeechLM:
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen2", len(tokenizer))
    vocabulary = add_speech(tokenizer, [CODES] * 3, n_codebooks=n_codebooks, pattern=pattern, frame_rate=12.5)
    extend_with_speech(model, vocabulary, seed=0)
    return SpeechLM(model, tokenizer, vocabulary)


LIMITS = [SpeechLimits(0.1 + 0.4 * (n % 4), 0.08 * (n % 3)) for n in range(len(TEXTS))]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_speech_of_places_that_were_taken_is_that_of_each_text_alone(
    joins, temperature: float, guidance: float
) -> None:
    """Two codebooks in turns: where a loop ends a row within a frame, the next stands at another place of its own."""
    settings = SynthesizeSettings(temperature=temperature, top_k=9, guidance=guidance, loop_s=0.2, seed=3)
    together, alone = alone_and_together(speaker(2, "flatten"), settings, LIMITS)
    assert together == alone
    assert len({len(codes[0]) for codes, _ in together}) > 3
    n_rows = 6 if guidance > 1 else 3
    assert joins and all(len(done) <= n_rows for done, _ in joins)
    assert temperature or any(len({n % 2 for n in done}) > 1 for done, _ in joins)


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_so_are_the_codes_of_further_books(joins, pattern: str, guidance: float) -> None:
    settings = SynthesizeSettings(temperature=1.0, guidance=guidance, loop_s=0.0, seed=3)
    together, alone = alone_and_together(speaker(3, pattern), settings, LIMITS)
    assert together == alone and joins


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_transcripts_have_each_a_budget_of_their_own(joins, temperature: float) -> None:
    speech_lm, rng = scripted(lambda prompt, said: None), np.random.default_rng(0)
    codes = [rng.integers(0, CODES, (2, n)) for n in (4, 30, 9, 12, 5, 21, 3, 28, 16, 7)]
    short = {"tokens_per_s": 4.0, "min_tokens": 2, "loop_tokens": 0, "temperature": temperature}
    together, alone = (
        transcribe_codes(speech_lm, codes, TranscribeSettings(batch_size=size, **short)) for size in (4, 1)
    )
    assert together == alone and joins
    assert len({output.n_tokens for output in together}) > 3
    # As the long ones leave, what comes is not padded to their width any more.
    assert joins[-1][1] < joins[0][1]


def test_ends_at_once_loops_and_broken_scores_of_rows_that_came_later(joins) -> None:
    """By a script: each text's number of codes, the longest text's first; the guard counts a row's own codes alone."""
    noise = np.random.default_rng(0).integers(0, CODES, 500).tolist()
    order = sorted(range(len(TEXTS)), key=lambda i: -len(TEXTS[i]))
    said = dict(
        zip(order, [noise[:30], [3], noise[:4], [5] * 90, [7], float("nan"), [2, 6] * 60, noise, [4]], strict=True)
    )
    speech_lm = scripted(lambda prompt, ids: say(prompt, ids))
    vocabulary, first = speech_lm.vocabulary, int(speech_lm.vocabulary.offsets[0])
    texts = [vocabulary.encode_text(speech_lm.text_tokenizer, text).tolist() for text in TEXTS]

    def say(prompt: list[int], ids: list[int]) -> int | float | None:
        codes = said[max((i for i in order if prompt[1:][: len(texts[i])] == texts[i]), key=lambda i: len(texts[i]))]
        if isinstance(codes, float):
            return codes
        return first + codes[len(ids)] if len(ids) < len(codes) else vocabulary.speech_end_id

    settings = SynthesizeSettings(temperature=0.0)
    limits = [SpeechLimits(7.2, 0.0)] * len(TEXTS)
    together, alone = alone_and_together(speech_lm, settings, limits)
    assert together == alone and joins
    reasons = [together[i][1] for i in order]
    assert reasons == ["stop", "stop", "stop", "loop", "stop", "non_finite", "loop", "length", "stop"]


@pytest.mark.parametrize(
    ("model", "config", "refilled"),
    [
        (Gemma3ForCausalLM, Gemma3TextConfig(**DEEP, head_dim=16, sliding_window=6), True),
        (BloomForCausalLM, BloomConfig(**SIZES, n_layer=2, n_head=2), True),
        (Lfm2ForCausalLM, Lfm2Config(**DEEP, layer_types=["conv", "full_attention"]), False),
        (MambaForCausalLM, MambaConfig(**SIZES, num_hidden_layers=2, state_size=8), False),
    ],
)
def test_whatever_the_model_keeps_of_what_it_read(joins, model, config, refilled: bool) -> None:
    """A window that is full in some rows alone, distances in place of positions; with a state batch after batch."""
    llm, legal = opinionated(model, config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 60, n) for n in (9, 3, 1, 20, 5, 2, 12)]
    limits = [RowLimits(n) for n in (4, 30, 8, 0, 16, 1, 9)]

    def answers(batch_size: int) -> list[Answer]:
        seeds = [1, 2, 3, 4, 5, 6, 7]
        return decode(llm, prompts, Grammar([legal], 2, 1), limits, seeds, batch_size=batch_size, temperature=1.0)

    assert answers(3) == answers(1)
    assert bool(joins) == refilled


def test_the_longest_begin_and_what_is_read_together_is_of_like_length() -> None:
    lengths = [5, 40, 12, 9, 30, 11, 100]
    waiting = Waiting(range(7), lengths, batch_size=3)
    assert waiting.take([]) == [[4, 1], [6]] and len(waiting) == 4
    assert waiting.take([6, 4, 1]) == []
    assert waiting.take([4]) == [[5, 2]]
    bounded = Waiting(range(7), lengths, batch_size=3, most=80)
    assert bounded.take([]) == [[6]] and bounded.take([6]) == []  # longer than what is allowed: alone
    assert bounded.take([]) == [[4, 1]]
    assert bounded.take([4]) == [[2]]  # beside 30, two more would be 90


def test_a_cache_with_slots_to_spare_holds_what_any_does() -> None:
    """Rows leave, others come, and it is written on; between these nothing is copied."""
    model, rng = tiny_model("llama", 60), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (3, 90), generator=rng)
    spare, plain = attention_cache.new_cache(model), {attention_cache.cache_name(model): DynamicCache()}
    places = set()
    with torch.inference_mode():
        for start, end in [(0, 5), *((n, n + 1) for n in range(5, 90))]:
            if start == 20:
                for (cache,) in (spare.values(), plain.values()):
                    cache.reorder_cache(torch.tensor([2, 0]))
                ids = ids[[2, 0]]
            scores = [model(input_ids=ids[:, start:end], use_cache=True, **cache).logits for cache in (spare, plain)]
            torch.testing.assert_close(*scores)
            (cache,) = spare.values()
            places.add(cache.layers[0].keys.data_ptr())
    assert cache.get_seq_length() == 90 and len(places) <= 5
