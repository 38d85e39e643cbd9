"""Answers that do not end by themselves: endless, in a loop, too short, of broken scores; and what they cost others."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from slm_scripted import KNOWN, scripted
from slm_tiny import CODES, DEEP, SIZES, opinionated, tokens_of, utterances
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from slm.decoding.decode import decode
from slm.decoding.loops import LoopWatch, longest_loop
from slm.decoding.row_rules import Grammar, RowEnds, RowLimits
from slm.generation import SpeechLM, generate_speech, stream_speech, synthesize_codes, transcribe_codes
from slm.settings import GenerationError, SynthesizeSettings, TranscribeSettings, speech_limits
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import make_prompt
from slm.training.samples import NoiseConfig, SpeechSamples

GREEDY = SynthesizeSettings(temperature=0.0)
NO_GUARD = SynthesizeSettings(temperature=0.0, loop_s=0.0)


def noise(n: int, seed: int = 0) -> list[int]:
    """Codes without a loop."""
    return np.random.default_rng(seed).integers(0, CODES, n).tolist()


def speaker(answers: dict[str, list[int] | float]) -> SpeechLM:
    """Says the codes of a text, and then ends; a float is what its scores are."""
    speech_lm = scripted(lambda prompt, said: say(prompt, said))
    vocabulary, first = speech_lm.vocabulary, int(speech_lm.vocabulary.offsets[0])
    prompts = {tuple(vocabulary.encode_text(speech_lm.text_tokenizer, text)): codes for text, codes in answers.items()}

    def say(prompt: list[int], said: list[int]) -> int | float | None:
        found = (codes for text, codes in prompts.items() if tuple(prompt[1 : 1 + len(text)]) == text)
        codes = next(found, None)  # a bare prompt has no text
        if codes is None:
            return None
        if isinstance(codes, float):
            return codes
        if len(said) < len(codes):
            return first + codes[len(said)]
        return vocabulary.speech_end_id

    return speech_lm


def test_a_model_whose_end_never_comes_is_stopped_at_its_text_s_budget() -> None:
    """Its codes are noise, so that no guard sees a loop."""
    text = "set white in z four soon"
    speech_lm = speaker({text: noise(500)})
    limits = speech_limits(speech_lm.vocabulary, text, GREEDY)
    assert limits.most_s == pytest.approx(1.5 * len(text) / 8)
    (output,) = synthesize_codes(speech_lm, [text], GREEDY)
    assert output.finish_reason == "length" and output.truncated
    assert output.codes.shape[1] == math.ceil(limits.most_s * 12.5)
    assert len(speech_lm.model.forwards) == output.codes.shape[1] + 1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_model_whose_end_is_at_minus_infinity_is_stopped(guidance: float) -> None:
    """Whatever it draws, and where the scores of two prompts are taken from each other too."""
    speech_lm = scripted(lambda prompt, said: None)
    end = torch.tensor([speech_lm.vocabulary.speech_end_id])
    head = speech_lm.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, scores: scores.index_fill(-1, end, -math.inf))
    text = "set white in z four soon"
    (output,) = synthesize_codes(speech_lm, [text], SynthesizeSettings(temperature=1.0, guidance=guidance))
    assert output.finish_reason == "length" and output.codes.shape[1] == math.ceil(1.5 * len(text) / 8 * 12.5)


@pytest.mark.parametrize("phrase", [[3, 7], [1, 2, 3, 4, 5, 6, 7], [5]])
def test_a_model_in_a_loop_of_frames_or_of_a_phrase_is_stopped_and_named(phrase: list[int]) -> None:
    text = "place green with k one again now and then"
    start = noise(4, seed=1)
    speech_lm = speaker({text: start + phrase * 100})
    (output,) = synthesize_codes(speech_lm, [text], GREEDY)
    assert output.finish_reason == "loop"
    # Four turns, and longer than 1.5 s, which is 19 frames: whatever comes later.
    n = output.codes.shape[1] - len(start)
    assert n == max(4 * len(phrase), 20)
    (unguarded,) = synthesize_codes(speech_lm, [text], NO_GUARD)
    assert unguarded.finish_reason == "length" and unguarded.codes.shape[1] > output.codes.shape[1]


def test_the_training_s_own_repetitions_are_no_loop() -> None:
    """A model whose training had three seconds of one code, which is silence, may say so too."""
    text = "a" * 40
    speech_lm = speaker({text: noise(4) + [5] * 40 + noise(10, seed=2)})
    (cut,) = synthesize_codes(speech_lm, [text], GREEDY)
    known = dataclasses.replace(KNOWN, longest_loop_s=3.0)
    speech_lm.vocabulary = dataclasses.replace(speech_lm.vocabulary, trained_on=known)
    (whole,) = synthesize_codes(speech_lm, [text], GREEDY)
    assert (cut.finish_reason, whole.finish_reason) == ("loop", "stop") and whole.codes.shape[1] == 54


def test_an_end_that_comes_too_early_is_put_off() -> None:
    """Half of what the training's fastest took for so many characters; the row beside it keeps its own."""
    long, short = "set white in z four soon please again", "lay"
    speech_lm = speaker({long: [1], short: [2, 3]})
    outputs = synthesize_codes(speech_lm, [long, short], GREEDY)
    assert [output.codes.shape[1] for output in outputs] == [int(0.5 * len(long) / 25 * 12.5), 2]
    assert {output.finish_reason for output in outputs} == {"stop"}
    free = SynthesizeSettings(temperature=0.0, min_seconds_per_character=0.0)
    assert [output.codes.shape[1] for output in synthesize_codes(speech_lm, [long, short], free)] == [1, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_never_ends_changes_and_delays_no_other(temperature: float) -> None:
    texts = ["bin blue at f two now", "lay red by a nine", "set white in z four", "place green with k one again please"]
    answers = {text: noise(8 + 2 * i, seed=i) for i, text in enumerate(texts[:3])}
    speech_lm = speaker(answers | {texts[3]: noise(500)})
    settings = SynthesizeSettings(temperature=temperature)
    together = synthesize_codes(speech_lm, texts, settings)
    rows = list(speech_lm.model.forwards)
    alone = [synthesize_codes(speech_lm, [text], settings)[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert one.codes.tolist() == other.codes.tolist() and one.finish_reason == other.finish_reason
    assert [output.finish_reason for output in together] == ["stop"] * 3 + ["length"]
    # Half have ended after the second answer's end, the third leaves with its own: the rest is the endless one's alone.
    assert rows == [4] * 11 + [2] * 2 + [1] * (together[3].codes.shape[1] + 1 - 13)


def test_rows_that_go_on_read_their_own_part_of_the_cache() -> None:
    """Without a script: what the model itself says after the others have left is what it says alone."""
    texts = ["bin blue at f two now", "lay red", "set white in z four soon", "place green"]
    speech_lm = scripted(lambda prompt, said: None)
    for temperature in (0.0, 1.3):
        settings = SynthesizeSettings(temperature=temperature, seed=3, loop_s=0.0)
        together = synthesize_codes(speech_lm, texts, settings)
        widths = set(speech_lm.model.forwards)
        alone = [synthesize_codes(speech_lm, [text], settings)[0] for text in texts]
        assert [one.codes.tolist() for one in together] == [one.codes.tolist() for one in alone]
    assert len(widths) > 1  # some had left


def test_scores_that_are_not_finite_end_their_row_alone() -> None:
    answers = {"bin blue": noise(8), "lay red": math.nan, "set white": math.inf, "place": -math.inf, "again": noise(6)}
    speech_lm = speaker(answers)
    outputs = synthesize_codes(speech_lm, list(answers), GREEDY)
    assert [output.finish_reason for output in outputs] == ["stop", "non_finite", "non_finite", "non_finite", "stop"]
    assert [output.codes.shape[1] for output in outputs] == [8, 0, 0, 0, 6]


def test_an_answer_without_an_end_is_drawn_again_if_asked() -> None:
    """The next seed, for those alone; how often is told. A greedy answer would be the same."""
    texts = [f"{word} at f two now" for word in ("red", "blue", "green", "white", "lay", "set")]
    speech_lm = scripted(lambda prompt, said: None)
    settings = {"temperature": 1.0, "min_seconds": 1.2, "seconds_per_character": 0.0, "min_seconds_per_character": 0.0}
    first = synthesize_codes(speech_lm, texts, SynthesizeSettings(**settings))
    assert any(output.truncated for output in first) and not all(output.truncated for output in first)
    again = synthesize_codes(speech_lm, texts, SynthesizeSettings(**settings, retries=2))
    following = [synthesize_codes(speech_lm, texts, SynthesizeSettings(**settings, seed=seed)) for seed in (1, 2)]
    for i, output in enumerate(again):
        attempts = [first[i], following[0][i], following[1][i]]
        chosen = next((n for n, one in enumerate(attempts) if not one.truncated), 2)
        assert output.attempts == chosen + 1 and output.codes.tolist() == attempts[chosen].codes.tolist()
    with pytest.raises(GenerationError, match="retries"):
        SynthesizeSettings(retries=1, temperature=0.0)


def writer(sentences: list[list[int]]) -> SpeechLM:
    """Writes the text ids of the utterance whose first code is their number; then ends."""
    speech_lm = scripted(lambda prompt, said: write(prompt, said))
    vocabulary = speech_lm.vocabulary

    def write(prompt: list[int], said: list[int]) -> int:
        ids = sentences[prompt[prompt.index(vocabulary.speech_id) + 1] - int(vocabulary.offsets[0])]
        return ids[len(said)] if len(said) < len(ids) else vocabulary.end_id

    return speech_lm


def test_a_transcript_that_repeats_a_phrase_is_stopped_and_named() -> None:
    tokenizer = scripted(lambda prompt, said: None)
    encode = lambda text: tokenizer.vocabulary.encode_text(tokenizer.text_tokenizer, text).tolist()  # noqa: E731
    phrase = encode(" four soon")
    speech_lm = writer([encode("bin blue at f two now"), encode("set white") + phrase * 40])
    codes = [np.full((1, 30), 0), np.full((1, 30), 1)]
    whole, looped = transcribe_codes(speech_lm, codes)
    assert (whole.text, whole.finish_reason) == ("bin blue at f two now", "stop")
    assert looped.finish_reason == "loop" and looped.truncated and looped.text.startswith("set white four soon four")
    assert looped.n_tokens <= len(encode("set white")) + 24 + len(phrase)
    assert transcribe_codes(speech_lm, codes, TranscribeSettings(loop_tokens=0))[1].finish_reason == "length"
    assert transcribe_codes(speech_lm, codes, TranscribeSettings(num_beams=2))[1].finish_reason == "loop"


def test_text_may_be_drawn_or_asked_for_several_times() -> None:
    speech_lm = scripted(lambda prompt, said: None)
    codes = [row["audio_codes"] for row in utterances(4)]
    short = {"tokens_per_s": 1.0, "min_tokens": 4}
    drawn = [
        [output.text for output in transcribe_codes(speech_lm, codes, TranscribeSettings(**short, **settings))]
        for settings in ({"temperature": 1.0}, {"temperature": 1.0, "batch_size": 1}, {"temperature": 1.0, "seed": 1})
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    best = transcribe_codes(speech_lm, codes, TranscribeSettings(**short, num_beams=4, n_best=3))
    single = transcribe_codes(speech_lm, codes, TranscribeSettings(**short, num_beams=4))
    for one, other in zip(best, single, strict=True):
        assert len(set(one.n_best)) > 1 and len(one.n_best) == 3 and one.n_best[0] == one.text == other.text
        assert other.n_best == ()
    for wrong in ({"n_best": 2}, {"num_beams": 2, "temperature": 1.0}, {"temperature": -1.0}):
        with pytest.raises(GenerationError):
            TranscribeSettings(**wrong)


@pytest.mark.parametrize("n_places", [1, 3])
def test_a_loop_is_seen_as_it_comes_just_when_it_is_one(n_places: int) -> None:
    """Token by token the same verdict as of the whole so far, at the end of each frame."""
    rng, limit = np.random.default_rng(0), 9
    for period in (1, 2, 3, 5):
        phrase = rng.integers(0, 50, (n_places, period))
        frames = np.concatenate([rng.integers(0, 50, (n_places, 6)), np.tile(phrase, 8), np.full((n_places, 1), 60)], 1)
        tokens = torch.from_numpy(frames.T.reshape(1, -1).copy())
        watch = LoopWatch(1, n_places, limit, frames.shape[1], tokens.device)
        for end in range(1, tokens.shape[1] + 1):
            seen = bool(watch.update(tokens[:, :end]))
            if end % n_places == 0:
                so_far = frames[:, : end // n_places]
                ongoing = longest_loop(so_far) > limit and longest_loop(so_far[:, 6:]) == so_far.shape[1] - 6
                assert seen == ongoing, (period, end)


def test_guidance_moves_the_scores_on_from_those_without_a_prompt() -> None:
    """The greedy code by hand, from both prompts' scores; a row's answer is its own in any batch, and 1 is none."""
    texts = ["bin blue at f two now", "lay red", "set white in z four soon"]
    speech_lm = scripted(lambda prompt, said: None)
    vocabulary, model = speech_lm.vocabulary, speech_lm.model
    short = {"temperature": 0.0, "min_seconds": 1.0, "seconds_per_character": 0.0, "loop_s": 0.0}
    for scale in (1.0, 4.0):
        together = synthesize_codes(speech_lm, texts, SynthesizeSettings(**short, guidance=scale))
        alone = [synthesize_codes(speech_lm, [text], SynthesizeSettings(**short, guidance=scale))[0] for text in texts]
        assert [one.codes.tolist() for one in together] == [one.codes.tolist() for one in alone]
        for text, output in zip(texts, together, strict=True):
            asked = UtteranceTokens(text=vocabulary.encode_text(speech_lm.text_tokenizer, text))
            prompts = [make_prompt(vocabulary, get_task("tts"), asked, bare=bare) for bare in (False, True)]
            assert prompts[1].tolist() == [1, vocabulary.mark_id("<|synthesize|>"), vocabulary.speech_id]
            with torch.no_grad():
                scores = [
                    model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1].log_softmax(-1) for prompt in prompts
                ]
            guided = scores[1] + scale * (scores[0] - scores[1])
            assert int(output.codes[0, 0]) == int(guided[vocabulary.speech_ids()[0]].argmax())
    drawn = SynthesizeSettings(**short | {"temperature": 1.0}, guidance=4.0)
    together = synthesize_codes(speech_lm, texts, drawn, keys=list("abc"))
    assert together[1].codes.tolist() == synthesize_codes(speech_lm, texts[1:2], drawn, keys=["b"])[0].codes.tolist()


def test_some_answers_are_learnt_without_their_prompt() -> None:
    """A share of the answers in speech, their codes untouched; none where it is not asked for, none of ASR's."""
    speech_lm = scripted(lambda prompt, said: None)
    vocabulary, rows = speech_lm.vocabulary, utterances(40)
    spoken = tokens_of(vocabulary, speech_lm.text_tokenizer, rows)
    mark = vocabulary.mark_id("<|synthesize|>")
    noise = NoiseConfig(replace=0.0, drop=0.0, drop_prompt=0.25)
    for settings, expected in ((noise, 10), (NoiseConfig(replace=0.0, drop=0.0), 0)):
        samples = SpeechSamples(vocabulary, spoken, {"asr": 1.0, "tts": 1.0}, settings)
        rng, n_bare = np.random.default_rng(0), 0
        for index in range(len(samples.lengths)):
            plain, example = samples.example(index, None), samples.example(index, rng)
            assert example.input_ids[example.labels >= 0].tolist() == plain.input_ids[plain.labels >= 0].tolist()
            if len(example) < len(plain):
                assert example.input_ids[1] == mark
                n_bare += 1
        assert abs(n_bare - expected) <= (4 if expected else 0)


@pytest.mark.parametrize(
    ("model", "config", "reads_on"),
    [
        (Gemma3ForCausalLM, Gemma3TextConfig(**DEEP, head_dim=16, sliding_window=6), True),
        (Lfm2ForCausalLM, Lfm2Config(**DEEP, layer_types=["conv", "full_attention"]), True),
        (BloomForCausalLM, BloomConfig(**SIZES, n_layer=2, n_head=2), True),
        (MambaForCausalLM, MambaConfig(**SIZES, num_hidden_layers=2, state_size=8), False),
    ],
)
def test_rows_leave_whatever_the_model_keeps_of_what_it_read(model, config, reads_on: bool, monkeypatch) -> None:
    """Windows, states, both: a batch that rows leave writes what one that they stay in does."""
    llm, legal = opinionated(model, config)
    rng, calls, generate = np.random.default_rng(0), [], llm.generate
    llm.generate = lambda **arguments: calls.append(arguments) or generate(**arguments)
    prompts = [rng.integers(3, 60, n) for n in (9, 12, 10, 11, 12)]
    limits = [RowLimits(n) for n in (4, 30, 8, 25, 16)]
    batch = (llm, prompts, Grammar([legal], 2, 1), limits, [1, 2, 3, 4, 5])
    leaving = decode(*batch, temperature=1.0)
    assert [len(call["input_ids"]) for call in calls] == [5, 2, 1]
    assert all(bool({"cache", "past_key_values"} & call.keys()) == reads_on for call in calls[1:])
    end = RowEnds.__call__
    monkeypatch.setattr(RowEnds, "__call__", lambda self, *a, **k: end(self, *a, **k) & (self.reasons >= 0))
    assert decode(*batch, temperature=1.0) == leaving and len(calls) == 4
    assert len({len(answer.ids) for answer in leaving}) > 3


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_stream_gives_the_codes_of_the_whole_answer(guidance: float) -> None:
    """Chunk by chunk, of a random draw and of a loop; the last tells why the answer ended."""
    settings = SynthesizeSettings(temperature=1.0, seed=2, guidance=guidance)
    text = "place green with k one again"
    looping = speaker({text: noise(6) + [3, 7] * 40})
    for speech_lm, reason in ((scripted(lambda prompt, said: None), None), (looping, "loop")):
        vocabulary = speech_lm.vocabulary
        asked = UtteranceTokens(text=vocabulary.encode_text(speech_lm.text_tokenizer, text))
        limits, task = speech_limits(vocabulary, text, settings), get_task("tts")
        (whole,) = generate_speech(speech_lm, task, [asked], [limits], settings, ["a"])
        chunks = list(stream_speech(speech_lm, task, asked, limits, settings, "a", chunk_s=0.4))
        assert np.concatenate([chunk.codes for chunk in chunks], axis=1).tolist() == whole.codes.tolist()
        assert [chunk.finish_reason for chunk in chunks[:-1]] == ["going"] * (len(chunks) - 1)
        assert chunks[-1].finish_reason == whole.finish_reason and reason in (None, whole.finish_reason)
        assert all(chunk.codes.shape[1] == 5 for chunk in chunks[:-1]) and len(chunks) > 3
    with pytest.raises(GenerationError, match="retries"):
        next(stream_speech(speech_lm, task, asked, limits, SynthesizeSettings(retries=1)))
