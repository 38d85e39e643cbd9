"""Patterns of codes: layouts that are undone exactly, their ids and labels, what a plan says they cost."""

from __future__ import annotations

import doctest
import json

import numpy as np
import pytest
import torch
from slm_tiny import CODES, FINGERPRINT, save_llm, tiny_tokenizer, tokens_of, utterances, write_corpus

from recipes.commands import finetune
from recipes.config import ConfigError, load_config
from recipes.finetuning.pattern_costs import pattern_costs
from slm import patterns
from slm.model.modeling import describe_llm, load_llm
from slm.patterns import EMPTY, LATE, PATTERNS, Delayed, Interleaved, PatternError, resolve_pattern
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import IGNORE, example_length, make_example, make_prompt
from slm.training.batches import pack
from slm.training.samples import NoiseConfig, SpeechSamples
from slm.vocabulary import FORMAT, FORMAT_3, SpeechVocabulary, VocabularyError, add_speech


def vocabulary_of(n: int, pattern: str = "delay", sizes: tuple[int, ...] = (CODES,) * 4):
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, sizes, n_codebooks=n, fingerprint=FINGERPRINT, pattern=pattern)
    return tokenizer, vocabulary


def test_the_docstring_s_layouts() -> None:
    result = doctest.testmod(patterns)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("frames", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_layout_is_undone_exactly(n: int, frames: int) -> None:
    """Of any number of codebooks and frames, more codebooks than frames too."""
    codes = np.random.default_rng(n).integers(0, 100, (n, frames))
    for pattern in [Interleaved(n), *([Delayed(n), Delayed(n, late=0)] if n > 1 else [])]:
        grid = pattern.apply(codes)
        assert grid.shape == (pattern.positions(frames), pattern.n_streams)
        assert np.array_equal(pattern.undo(grid), codes)
        assert np.sort(grid[grid != EMPTY]).tolist() == np.sort(codes.ravel()).tolist()


@pytest.mark.parametrize(("n", "frames"), [(2, 5), (4, 6), (5, 2)])
def test_book_k_is_k_frames_late(n: int, frames: int) -> None:
    codes = np.random.default_rng(0).integers(0, 100, (n, frames))
    grid = Delayed(n).apply(codes)
    for position, row in enumerate(grid):
        for book, code in enumerate(row):
            frame = position - book
            assert code == (codes[book, frame] if 0 <= frame < frames else EMPTY)


def test_of_a_part_of_the_positions_whole_frames_come_back() -> None:
    codes = np.arange(12).reshape(3, 4)
    grid = Delayed(3).apply(codes)
    for n in range(len(grid) + 1):
        assert np.array_equal(Delayed(3).undo(grid[:n]), codes[:, : max(0, n - 2)])
    flat = Interleaved(3).apply(codes)
    assert np.array_equal(Interleaved(3).undo(flat[:8]), codes[:, :2])


@pytest.mark.parametrize(
    ("name", "n", "message"),
    [
        ("semantic", 2, "n_codebooks=1"),
        ("flatten", 1, "n_codebooks=2"),
        ("delay", 1, "semantic"),
        ("parallel", 1, "semantic"),
        ("coarse", 2, "auto"),
    ],
)
def test_a_pattern_that_does_not_fit_is_told(name: str, n: int, message: str) -> None:
    with pytest.raises(PatternError, match=message):
        resolve_pattern(name, n)


def test_auto_is_what_there_was_before() -> None:
    assert resolve_pattern("auto", 1).name == "semantic" and resolve_pattern("auto", 3).name == "flatten"
    for n, name in ((1, "semantic"), (2, "flatten")):
        _, before = vocabulary_of(n, "auto")
        assert vocabulary_of(n, name)[1] == before and before.pattern.name == name


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_ids_of_codes_side_by_side_are_undone_exactly(n: int, late: int) -> None:
    """Book 0's are the LLM's rows, the same as with `semantic`; where it is over, its end stands."""
    tokenizer, vocabulary = vocabulary_of(n, ("parallel", "delay")[late], sizes=(CODES, 7, 5, 9))
    assert vocabulary.book_sizes == (CODES, 7, 5, 9)[:n] and vocabulary.size == len(tokenizer)
    assert vocabulary.new_ids == vocabulary_of(1, "semantic")[1].new_ids
    rng = np.random.default_rng(0)
    for frames in (1, 2, 6):
        codes = np.stack([rng.integers(0, size, frames) for size in vocabulary.book_sizes])
        grid = vocabulary.ids_from_codes(codes)
        assert np.array_equal(grid[:frames, 0], vocabulary.offsets[0] + codes[0])
        assert (grid[frames:, 0] == vocabulary.speech_end_id).all() and len(grid) == frames + late * (n - 1)
        assert np.array_equal(vocabulary.codes_from_ids(grid[:frames, 0], grid[:, 1:]), codes)
        # Of an answer that goes on: the frames all of whose books have come.
        part = vocabulary.codes_from_ids(grid[:-1, 0], grid[:-1, 1:])
        assert np.array_equal(part, codes[:, : frames - 1])
        wrong = codes.copy()
        wrong[1, 0] = 7
        with pytest.raises(VocabularyError, match="outside its codebook"):
            vocabulary.ids_from_codes(wrong)
    speech = vocabulary.speech(codes)
    assert len(speech) == vocabulary.speech_length(frames) == 1 + frames + (n - 1 if late else 1)
    assert speech[0, 0] == vocabulary.speech_id and speech[-1, 0] == vocabulary.speech_end_id


def test_the_folder_names_its_pattern_and_earlier_folders_stay_as_they_were(tmp_path) -> None:
    for name, n in (("semantic", 1), ("flatten", 3), ("delay", 3), ("parallel", 3)):
        tokenizer, vocabulary = vocabulary_of(n, name)
        vocabulary.save(tmp_path)
        loaded = SpeechVocabulary.load(tmp_path, tokenizer)
        assert loaded == vocabulary and loaded.pattern.name == name
        told = json.loads((tmp_path / "speech_vocabulary.json").read_text())
        if name in LATE:
            assert told["format"] == FORMAT_3 and told["pattern"] == name and told["further_sizes"] == [CODES] * 2
        else:
            assert told["format"] == FORMAT and "pattern" not in told and "further_sizes" not in told
    told["pattern"] = "coarse-first"
    (tmp_path / "speech_vocabulary.json").write_text(json.dumps(told))
    with pytest.raises(VocabularyError, match="coarse-first.*knows delay, parallel"):
        SpeechVocabulary.load(tmp_path)


@pytest.mark.parametrize("pattern", ["flatten", "delay", "parallel"])
@pytest.mark.parametrize("task", ["asr", "tts", "continuation"])
def test_a_length_is_that_of_the_sequence(task: str, pattern: str) -> None:
    tokenizer = tiny_tokenizer()
    marks = get_task(task).marks
    vocabulary = add_speech(tokenizer, [CODES] * 3, n_codebooks=3, pattern=pattern, marks=marks)
    for one in tokens_of(vocabulary, tokenizer, utterances(3, books=4)):
        one = UtteranceTokens(one.codes, one.text, prompt_share=0.5)
        example = make_example(vocabulary, get_task(task), one)
        assert example_length(vocabulary, get_task(task), one) == len(example) == len(example.labels)
        prompt = make_prompt(vocabulary, get_task(task), one)
        assert np.array_equal(prompt if pattern == "flatten" else prompt[:, 0], example.input_ids[: len(prompt)])


@pytest.mark.parametrize("late", [0, 1])
def test_each_code_of_an_answer_is_learnt_once_and_none_of_a_prompt(late: int) -> None:
    n = 4
    tokenizer, vocabulary = vocabulary_of(n, ("parallel", "delay")[late])
    (one,) = tokens_of(vocabulary, tokenizer, utterances(1, books=n))
    said, heard = (make_example(vocabulary, get_task(task), one) for task in ("tts", "asr"))
    for book in range(1, n):
        learnt = said.further_labels[:, book - 1]
        assert np.array_equal(learnt[learnt != IGNORE], one.codes[book])
        given = heard.further[:, book - 1]
        assert np.array_equal(given[given != EMPTY], one.codes[book])
    assert (heard.further_labels == IGNORE).all()
    assert np.array_equal(said.labels[said.labels != IGNORE][:-2], vocabulary.offsets[0] + one.codes[0])
    # The end of book 0 is learnt where it comes; while the others follow, it is given.
    assert (said.labels == vocabulary.speech_end_id).sum() == 1
    assert (said.input_ids == vocabulary.speech_end_id).sum() == (n - 1 if late else 1)
    first = np.flatnonzero(said.input_ids == vocabulary.speech_id)[0] + 1
    starts = [np.flatnonzero(said.further[:, book] != EMPTY)[0] - first for book in range(n - 1)]
    assert starts == [late * book for book in (1, 2, 3)]


def test_packed_rows_hold_the_further_codes_of_their_sequences() -> None:
    tokenizer, vocabulary = vocabulary_of(3)
    tokens = tokens_of(vocabulary, tokenizer, utterances(3, books=3))
    examples = [make_example(vocabulary, get_task("tts"), one) for one in tokens]
    batch = pack(examples, [1.0, 0.5, 2.0], pack_length=70, numbered=True)
    for number, example in enumerate(examples):
        own = batch["sequences"] == number
        assert np.array_equal(batch["further"][own], example.further)
        assert np.array_equal(batch["further_labels"][own], example.further_labels)
        assert set(batch["further_weights"][own].tolist()) == {[1.0, 0.5, 2.0][number]}
    padding = batch["sequences"] < 0
    assert padding.any() and (batch["further"][padding] == EMPTY).all()
    assert (batch["further_labels"][padding] == IGNORE).all()


def test_noise_keeps_every_code_in_its_book() -> None:
    tokenizer, vocabulary = vocabulary_of(3, sizes=(CODES, 3, 2))
    rows = utterances(4, books=3)
    for row in rows:
        row["audio_codes"] %= np.array([[CODES], [3], [2]])
    samples = SpeechSamples(vocabulary, tokens_of(vocabulary, tokenizer, rows), {"asr": 1.0}, NoiseConfig(0.9, 0.3))
    for index in range(4):
        example = samples.example(index, np.random.default_rng(index))
        assert (example.further < np.array([3, 2])).all() and example.further.max() > EMPTY


def test_what_a_second_costs_by_each_pattern(tmp_path) -> None:
    """The cache as a model fills it, and the weights that a position goes through."""
    folder = save_llm(tmp_path / "llm")
    facts = describe_llm(str(folder))
    _, vocabulary = vocabulary_of(4)
    costs = pattern_costs(facts, vocabulary, [CODES] * 4, "fp32")
    assert [cost["positions per s"] for cost in costs.values()] == [12.5, 50.0, 12.5, 12.5]
    assert [cost["codebooks"] for cost in costs.values()] == [1, 4, 4, 4]
    assert costs["parallel"] == costs["delay"]
    model, _, _ = load_llm(str(folder))
    cache = model(input_ids=torch.arange(25)[None], use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert costs["semantic"]["KV cache KiB per s"] == round(held / 2 / 1024, 1)
    assert costs["flatten"]["KV cache KiB per s"] == pytest.approx(4 * held / 2 / 1024, abs=0.1)
    assert costs["delay"]["KV cache KiB per s"] == costs["semantic"]["KV cache KiB per s"]
    assert costs["delay"]["vocabulary rows"] == costs["semantic"]["vocabulary rows"]
    assert costs["flatten"]["vocabulary rows"] >= vocabulary.first_id + 4 + 4 * CODES
    assert costs["delay"]["rows beside it"] == 3 * CODES
    layers = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    rows = costs["delay"]["vocabulary rows"] + 3 * CODES
    assert costs["delay"]["GFLOPs per s"] == round(12.5 * 2 * (layers + rows * 32) / 1e9, 3)


def test_a_plan_shows_the_patterns_side_by_side(tmp_path) -> None:
    save_llm(tmp_path / "llm")
    write_corpus(tmp_path / "codes")
    own = [f"run_dir={tmp_path / 'run'}", f"model={tmp_path / 'llm'}", f"corpus={tmp_path / 'codes'}", "device=cpu"]
    plan = finetune.plan(load_config(finetune.Config, None, own))
    assert plan["pattern"] == "semantic" and list(plan["patterns"]) == list(PATTERNS)
    own_rate, half = plan["patterns at"]["12.5 Hz"], plan["patterns at"]["6.25 Hz"]
    cost = plan["patterns"]["flatten"]
    assert own_rate["flatten"].startswith(f"{cost['positions per s']:g} positions, {cost['GFLOPs per s']:g} GFLOPs")
    assert half["semantic"].startswith("6.25 positions") and list(plan["patterns at"]) == [
        "25 Hz",
        "12.5 Hz",
        "6.25 Hz",
    ]
    delayed = finetune.plan(load_config(finetune.Config, None, [*own, "n_codebooks=2", "pattern=delay"]))
    assert delayed["pattern"] == "delay" and delayed["patterns"] == plan["patterns"]
    assert delayed["trainable parameters"] == plan["trainable parameters"] + 2 * CODES * 32
    assert delayed["tokens"]["tts"]["tokens an epoch"] == plan["tokens"]["tts"]["tokens an epoch"]
    for wrong in (["pattern=delay"], ["pattern=semantic", "n_codebooks=2"], ["further_weight=0"], ["pattern=wide"]):
        with pytest.raises(ConfigError, match="pattern|further_weight"):
            load_config(finetune.Config, None, [*own, *wrong])
