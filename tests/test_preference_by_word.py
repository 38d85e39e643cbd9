"""``slm train-preference`` of a model that says a text word by word (task `tts-aligned`)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from preference_tiny import Codec, lines
from slm_tiny import CODES, FINGERPRINT

from recipes.commands import train_preference
from recipes.config import ConfigError
from recipes.preference.groups import prompt_samples
from recipes.preference.samples import Speaker, Spoken
from recipes.preference.texts import read_texts
from slm.generation import SaidWord, SpeechLM
from slm.model.modeling import describe_llm, load_llm, save_slm
from slm.model.speech_rows import extend_with_speech
from slm.tasks import get_task
from slm.tasks.tts_aligned import TTS_ALIGNED, word_ids
from slm.trained_on import TrainedOn
from slm.vocabulary import add_speech

pytest_plugins = ["preference_tiny"]  # its fixtures
PHRASES = ["abc cab", "bca abc cab", "aab bcc", "cca abb bb", "abab cc", "bcb cab abc"]


@pytest.fixture
def aligned(start, configure, tmp_path_factory):
    """A loader of configurations for a model that says word by word, at random."""
    folder = tmp_path_factory.mktemp("aligned")
    model, tokenizer, _ = load_llm(str(start / "llm"))
    vocabulary = add_speech(
        tokenizer, [CODES], fingerprint=FINGERPRINT, tokenizer="tiny", normaliser="basic", marks=TTS_ALIGNED.marks
    )
    known = TrainedOn("abc ", 14, 1.0, (6.0, 7.5, 9.0), 7, 0.4, 4, tasks=("asr", "tts", "tts-aligned"))
    extend_with_speech(model, dataclasses.replace(vocabulary, trained_on=known), seed=0)
    save_slm(model, tokenizer, dataclasses.replace(vocabulary, trained_on=known), folder / "model")
    (folder / "texts.txt").write_text("\n".join(PHRASES) + "\n", encoding="utf-8")
    own = [f"model={folder / 'model'}", f"texts={folder / 'texts.txt'}", "decoding.max_word_s=0.8"]
    return lambda run, *overrides: configure(run, *own, "sampling.max_word_s=0.8", *overrides)


def test_answers_by_word_are_learnt_from_where_the_model_drew_them(aligned, tmp_path) -> None:
    """Codes and the ends that it reached count; words, their marks and the end of a word that was cut off are given."""
    config = aligned("run")
    assert train_preference.plan(config)["task"] == "tts-aligned"
    slm = SpeechLM.load(config.model)
    folder = train_preference.run(config)
    _, *rows = lines(tmp_path / "run" / "pairs.jsonl")
    vocabulary, reasons = slm.vocabulary, set()
    for row in rows:
        for side in ("chosen", "rejected"):
            words, codes = row[side]["words"], np.array(row[side]["codes"])
            reasons |= {reason for _, reason in words}
            assert len(words) == len(row["said"].split()) and sum(n for n, _ in words) == codes.shape[1]
            ids, drawn = [*vocabulary.before, vocabulary.mark_id("<|synthesize-aligned|>"), *vocabulary.between], []
            encode = lambda text: vocabulary.encode_text(slm.text_tokenizer, text)  # noqa: E731
            frames = np.split(codes, np.cumsum([n for n, _ in words])[:-1], axis=1)
            for word, said, (_, reason) in zip(word_ids(encode, row["said"]), frames, words, strict=True):
                ids += [*word, vocabulary.speech_id]
                own = [*vocabulary.ids_from_codes(said), vocabulary.speech_end_id]
                drawn += range(len(ids), len(ids) + len(own) - (reason != "stop"))
                ids += own
            with torch.no_grad():
                scores = slm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(scores[place - 1, ids[place]]) for place in drawn)
            assert row[side]["reference_log_probability"] == pytest.approx(expected, abs=1e-4)
    assert {"stop", "length"} <= reasons
    found = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "eval_kl" in row]
    assert found[0]["eval_kl"] == pytest.approx(0, abs=1e-6) and found[-1]["eval_kl"] > 1e-5
    assert SpeechLM.load(folder).vocabulary.trained_on.tasks == ("asr", "tts", "tts-aligned")


def test_groups_by_word_are_planned_as_long_as_they_become(aligned, tmp_path) -> None:
    settings = ["steps=2", "tokens_per_step=300", "eval_steps=0", "save_steps=2"]
    config = aligned("run", "method=grpo", *(f"training.{item}" for item in settings))
    facts = describe_llm(config.model)
    speaker = Speaker(facts.tokenizer, facts.vocabulary, Codec(), "cpu", get_task("tts-aligned"))
    text = read_texts(config, facts.vocabulary).train[0]
    n_words, n_frames = len(text.said.split()), round(speaker.expected_s(text) * 12.5)
    words = tuple(SaidWord(n, "stop") for n in (n_frames - n_words + 1, *[1] * (n_words - 1)))
    example = speaker.example(text, Spoken(np.zeros((1, n_frames), dtype=np.int64), "stop", None, words))
    assert prompt_samples(config, [text], speaker).lengths[0] == config.grpo.group_size * len(example)
    train_preference.run(config)
    rows = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert len(rows) == 2 and all(np.isfinite(row["reward"]) and row["grad_norm"] > 0 for row in rows)


def test_the_task_is_the_one_that_the_model_learnt_or_that_is_named(aligned, configure, tmp_path) -> None:
    plain = train_preference.run(aligned("plain", "task=tts"))
    # What was moved away from is not what `slm synthesize` asks by itself.
    assert SpeechLM.load(plain).vocabulary.trained_on.tasks == ("asr", "tts")
    assert train_preference.plan(configure("other"))["task"] == "tts"
    with pytest.raises(ConfigError, match="has not learnt tts-aligned"):
        train_preference.run(configure("other", "task=tts-aligned"))
    with pytest.raises(ConfigError, match="sampling.guidance: tts-aligned gives its words"):
        train_preference.plan(aligned("other", "sampling.guidance=2"))
    with pytest.raises(ConfigError, match="task"):
        configure("other", "task=asr")
