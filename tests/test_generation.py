"""Generation: legal ids, ends, budgets, seeds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from slm_standin import make_slm
from slm_tiny import CODES, save_llm, utterances

from slm.decoding.row_rules import Grammar, LegalIds, SeededSampling
from slm.decoding.running_batch import RunningBatch
from slm.generation import SpeechLM, synthesize_codes, transcribe_codes
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings, TranscribeSettings, speech_limits
from slm.tasks import get_task
from slm.trained_on import TrainedOn
from slm.vocabulary import VocabularyError


def test_what_was_learnt_comes_back(trained_slm: SpeechLM) -> None:
    rows = utterances(4)
    for beams in (1, 3):
        settings = TranscribeSettings(batch_size=3, num_beams=beams)
        heard = transcribe_codes(trained_slm, [row["audio_codes"] for row in rows], settings)
        assert [output.text for output in heard] == [row["text"] for row in rows]
        assert not any(output.truncated for output in heard)
    for temperature in (0.0, 0.1):
        settings = SynthesizeSettings(batch_size=3, temperature=temperature)
        said = synthesize_codes(trained_slm, [row["text"] for row in rows], settings)
        for output, row in zip(said, rows, strict=True):
            assert not output.truncated and (output.codes == row["audio_codes"][:1]).all()


def test_only_legal_ids_and_truncation_is_counted(untrained_slm: SpeechLM) -> None:
    codes = [row["audio_codes"] for row in utterances(6)]
    heard = transcribe_codes(untrained_slm, codes, TranscribeSettings(batch_size=4, tokens_per_s=2, min_tokens=3))
    for output, item in zip(heard, codes, strict=True):
        assert output.n_tokens <= 3 + np.ceil(item.shape[1] / 12.5 * 2)
        assert "<|" not in output.text
    assert any(output.truncated for output in heard)
    settings = SynthesizeSettings(temperature=1.0, min_seconds=0.4, seconds_per_character=0.0, seed=3)
    said = synthesize_codes(untrained_slm, ["lay red"] * 20, settings, keys=[str(i) for i in range(20)])
    assert any(output.truncated for output in said) and any(not output.truncated for output in said)
    for output in said:
        assert 1 <= output.codes.shape[1] <= 5 and output.codes.max() < CODES
        assert output.codes.shape[1] == 5 or not output.truncated


def test_several_codebooks_take_turns(tmp_path) -> None:
    speech_lm = make_slm(tmp_path, n_codebooks=2)
    settings = SynthesizeSettings(temperature=2.0, top_k=0, min_seconds=1.0, seconds_per_character=0.0)
    for output in synthesize_codes(speech_lm, ["a", "b", "c"], settings):
        assert output.codes.shape[0] == 2 and 1 <= output.codes.shape[1] <= 13
        assert output.codes.min() >= 0 and output.codes.max() < CODES  # each is of its own book


def test_a_text_draws_the_same_whatever_its_batch(untrained_slm: SpeechLM) -> None:
    texts = ["lay red", "set white in z four soon please again", "a", "bin blue"]
    settings = {"temperature": 1.0, "top_k": 8, "top_p": 0.9, "min_seconds": 1.0}

    def draw(batch_size: int, seed: int, order: list[int]) -> dict[str, list]:
        chosen = [texts[i] for i in order]
        outputs = synthesize_codes(
            untrained_slm, chosen, SynthesizeSettings(batch_size=batch_size, seed=seed, **settings)
        )
        return {text: output.codes.tolist() for text, output in zip(chosen, outputs, strict=True)}

    alone = draw(1, 5, [0, 1, 2, 3])
    assert alone == draw(4, 5, [0, 1, 2, 3]) == draw(2, 5, [3, 1, 0, 2])
    assert alone != draw(4, 6, [0, 1, 2, 3])


def test_one_long_recording_does_not_pad_the_others(untrained_slm: SpeechLM, monkeypatch) -> None:
    """Prompts are read beside others of like lengths, and bounded in seconds; what is written does not depend on it."""
    rng, read, running = np.random.default_rng(0), [], []
    frames = [10, 12, 11, 100, 9, 60, 55, 58]
    codes = [rng.integers(0, CODES, (2, n)) for n in frames]
    original = RunningBatch.go_on

    def go_on(batch: RunningBatch, *arguments) -> dict:
        lengths = sorted(len(batch.request.prompts[row]) for row in batch.rows)
        (read if batch.ids.shape[1] == batch.legal.starts[0] else running).append(lengths)
        return original(batch, *arguments)

    monkeypatch.setattr(RunningBatch, "go_on", go_on)
    settings = {"tokens_per_s": 0.1, "min_tokens": 3}
    together = transcribe_codes(untrained_slm, codes, TranscribeSettings(**settings, batch_seconds=10.0))
    batches, joined = list(read), list(running)
    assert together == transcribe_codes(untrained_slm, codes, TranscribeSettings(**settings, batch_size=1))
    assert sum(map(len, batches)) == len(codes)
    assert all(batch[-1] <= 2 * batch[0] for batch in batches)
    most = 10.0 * untrained_slm.vocabulary.frame_rate * untrained_slm.vocabulary.n_codebooks
    assert all(len(batch) * batch[-1] <= most for batch in batches + joined if len(batch) > 1)
    assert max(map(len, batches + joined)) >= 4


def test_draws_follow_the_softmax(untrained_slm: SpeechLM) -> None:
    """The first code of many draws is distributed as the model says."""
    vocabulary, n = untrained_slm.vocabulary, 600
    settings = SynthesizeSettings(batch_size=200, temperature=0.7, top_k=0, min_seconds=0.05, seconds_per_character=0.0)
    said = synthesize_codes(untrained_slm, ["red"] * n, settings, keys=[f"k{i}" for i in range(n)])
    counts = np.bincount([int(output.codes[0, 0]) for output in said], minlength=CODES) / n
    from slm.tasks.registry import UtteranceTokens
    from slm.tasks.sequences import make_prompt

    text = vocabulary.encode_text(untrained_slm.text_tokenizer, "red")
    prompt = make_prompt(vocabulary, get_task("tts"), UtteranceTokens(text=text))
    with torch.no_grad():
        logits = untrained_slm.model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1]
    expected = torch.softmax(logits[vocabulary.speech_ids()[0]] / 0.7, -1).numpy()
    assert np.abs(counts - expected).max() < 4 * np.sqrt(expected.max() / n)


def test_a_draw_costs_what_is_legal_and_not_the_vocabulary(monkeypatch) -> None:
    """Noise for the codes, not for the rows of a text vocabulary; a row draws the same in any company."""
    rows, columns = 5000, np.arange(4000, 4000 + CODES)
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[torch.from_numpy(columns)] = True
    drawn, real = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn.append(a[0]) or real(*a, **k))
    scores = torch.randn(3, rows, generator=torch.Generator().manual_seed(0))
    scores[:, 0] += 100  # the likeliest of all, and not legal
    prompt = torch.zeros(3, 4, dtype=torch.long)
    grammar = Grammar([mask], 7, min_new=1)
    together = SeededSampling(LegalIds(grammar, [4] * 3), [1, 2, 3], 0.8)(prompt, scores).argmax(-1)
    assert set(drawn) == {CODES} and set(together.tolist()) <= set(columns.tolist())
    alone = [
        int(SeededSampling(LegalIds(grammar, [4] * 3), [seed], 0.8)(prompt[:1], scores[i : i + 1]).argmax())
        for i, seed in enumerate((1, 2, 3))
    ]
    assert together.tolist() == alone
    later = LegalIds(grammar, [3] * 3)
    ((rows, legal),) = later.columns(prompt)
    assert rows.tolist() == [0, 1, 2] and legal.tolist() == [7, *columns.tolist()]  # now the end may come
    mixed = LegalIds(grammar, [4, 3, 4])
    assert [rows.tolist() for rows, _ in mixed.columns(prompt)] == [[0, 2], [1]]


def test_bad_input_is_told(untrained_slm: SpeechLM, tmp_path) -> None:
    with pytest.raises(GenerationError, match="text 2 of 2 is empty"):
        synthesize_codes(untrained_slm, ["a", " "])
    for settings in (TranscribeSettings, SynthesizeSettings):
        with pytest.raises(GenerationError, match="batch_size"):
            settings(batch_size=0)
    with pytest.raises(VocabularyError, match="slm finetune"):
        SpeechLM.load(save_llm(tmp_path / "llm"))
    assert transcribe_codes(untrained_slm, []) == [] and synthesize_codes(untrained_slm, []) == []


def test_the_limits_follow_the_training_s_rate_of_speech(untrained_slm) -> None:
    """At most 1.5 times its slowest, at least half of its fastest; what is below its shortest is allowed as much."""
    known = TrainedOn("abc", 24, 3.0, characters_per_s=(8, 10, 16), shortest_text=10)
    told = dataclasses.replace(untrained_slm.vocabulary, trained_on=known)
    before = dataclasses.replace(untrained_slm.vocabulary, trained_on=TrainedOn("abc", 24, 3.0, (8, 10, 16)))
    for vocabulary, characters, settings, expected in (
        (told, 40, {}, (1.5 * 40 / 8, 0.5 * 40 / 16)),
        (told, 2, {}, (1.5 * 10 / 8, 0.5 * 2 / 16)),
        (before, 40, {}, (4 + 40 * 2 / 8, 0)),  # without a shortest text: the rule of its making
        (untrained_slm.vocabulary, 40, {}, (4 + 40 * 0.25, 0)),
        (told, 40, {"seconds_per_character": 0.5, "min_seconds": 3.0, "min_seconds_per_character": 0.01}, (23.0, 0.4)),
        (told, 40, {"seconds_per_character": 0.5}, (20.0, 0.5 * 40 / 16)),
    ):
        found = speech_limits(vocabulary, "a" * characters, SynthesizeSettings(**settings))
        assert (found.most_s, found.least_s) == pytest.approx(expected)
    assert speech_limits(told, "a" * 40, SynthesizeSettings(), speech_s=2.0, is_said=False) == SpeechLimits(11.5, 0.0)
    assert speech_limits(told, "", SynthesizeSettings(), speech_s=2.0).most_s == 4.0 + 2 * 2.0  # speech goes on
