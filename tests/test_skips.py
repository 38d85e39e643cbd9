"""Words skipped and said again: by hand, in results and reports, with the faults of predictions; joined texts."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
from dataclasses import replace

import jiwer
import numpy as np
import pytest
import soundfile
from test_inference_runs import job, lines  # noqa: F401 - a fixture
from test_report import TEXTS, row
from test_score import Lengths, files, judge, write_audio  # noqa: F401 - fixtures

from eval.report.groups import groups_of, skips_in
from eval.report.markdown import results_markdown
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.rescoring import rescored
from eval.results_file import load_results, save_results
from eval.schema import Results
from eval.text.normalisers import get_normaliser
from eval.text.skips import skip_rates, skips_of
from eval.text.wer import score_pairs
from recipes.commands import evaluate, score, synthesize
from recipes.config import ConfigError, from_values
from recipes.inference.texts_to_say import longest_text
from recipes.scoring import evaluation

AS_WRITTEN = get_normaliser("none")


@pytest.mark.parametrize(
    ("said", "heard", "skipped", "phrases", "repeated"),
    [
        ("bin blue at f two now", "bin blue at f two now", 0, 0, 0),
        ("bin blue at f two now", "bin at f two now", 1, 0, 0),
        ("bin blue at f two now", "bin blue now", 3, 1, 0),
        ("bin blue at f two now", "blue at two", 3, 0, 0),  # three words, none beside another
        ("bin blue at f two now", "", 6, 1, 0),
        ("bin blue at f two now", None, 6, 1, 0),  # no answer
        ("bin blue at f", "bin blue blue at f", 0, 0, 1),
        ("bin blue at f", "bin blue blue blue at f", 0, 0, 2),
        ("bin blue at f", "bin blue bin blue at f", 0, 0, 2),
        ("bin blue at f two", "bin blue at f at f two", 0, 0, 2),
        ("bin blue at f", "bin blue at f bin blue at f", 0, 0, 4),
        ("no no go", "no no no go", 0, 0, 1),
        ("no no go", "no no go", 0, 0, 0),  # the text says it twice
        ("bin blue at f", "bin blue uh uh at f", 0, 0, 0),  # added twice, and not in the text
        ("bin blue at f", "bin blue please at f", 0, 0, 0),
        ("bin blue at f", "bin blue at f blue", 0, 0, 0),  # not beside its like
        ("bin blue at f", "bin bin at f", 0, 0, 0),  # in the place of another
    ],
)
def test_counts_by_hand(said, heard, skipped, phrases, repeated) -> None:
    found = skip_rates(score_pairs([said], [heard], AS_WRITTEN).utterances, samples=20)
    assert (found.skipped, found.skipped_phrases, found.repeated) == (skipped, phrases, repeated)
    assert found.n_words == len(said.split())


def test_all_utterances_together_with_intervals() -> None:
    said, heard = ["a b c d"] * 10, ["a b c d"] * 4 + ["a b"] * 3 + ["a b a b c d"] * 3
    utterances = score_pairs(said, heard, AS_WRITTEN).utterances
    found = skip_rates(utterances, samples=200)
    assert (found.skipped, found.skipped_phrases, found.repeated, found.n_words) == (6, 3, 6, 40)
    for low, high in (found.skipped_interval, found.repeated_interval):
        assert low < 6 / 40 < high
    deletions = sum(u.deletions for u in utterances)
    assert found.skipped == deletions


def test_a_long_babble_is_counted_soon() -> None:
    rng = np.random.default_rng(0)
    said = " ".join(f"w{number}" for number in range(40))
    heard = " ".join(f"w{number}" for number in rng.integers(0, 40, 800))
    found = skip_rates(score_pairs([said], [heard], AS_WRITTEN).utterances, samples=20)
    assert found.skipped + found.repeated < 800


def repeated_by_definition(said: list[str], heard: list[str], place: int, where: int, longest: int) -> bool:
    """Whether the word heard at ``place`` was said again, read off the definition: run by run, place by place."""
    for size in range(1, longest + 1):
        near = said[max(0, where - size) : where + size]
        runs = [near[first : first + size] for first in range(len(near) - size + 1)]
        for start in range(max(0, place - 2 * size + 1), min(place, len(heard) - 2 * size) + 1):
            run = heard[start : start + size]
            if run == heard[start + size : start + 2 * size] and run in runs:
                return True
    return False


def test_words_said_again_are_those_of_the_definition() -> None:
    rng, several = random.Random(0), 0
    for _ in range(1000):
        words = "abcdefghij"[: rng.choice([1, 2, 3, 10])]
        said = rng.choices(words, k=rng.randint(1, 20))
        heard = [word for word in said for _ in range(rng.choice([0, 1, 1, 1, 2]))] or ["a"]
        for _ in range(rng.randint(0, 2)):  # a phrase is said again
            end = rng.randint(0, len(heard))
            heard[end:end] = heard[max(0, end - rng.randint(1, 6)) : end]
        (chunks,) = jiwer.process_words([" ".join(said)], [" ".join(heard)]).alignments
        inserted = [
            (place, chunk.ref_start_idx)
            for chunk in chunks
            if chunk.type == "insert"
            for place in range(chunk.hyp_start_idx, chunk.hyp_end_idx)
        ]
        expected = sum(repeated_by_definition(said, heard, *one, len(inserted)) for one in inserted)
        assert skips_of(said, heard, chunks).repeated == expected, (said, heard)
        several += expected > 1
    assert several > 200


def test_an_utterance_of_hours_takes_memory_by_its_length_alone() -> None:
    """26,000 words, a fifth of them wrong, as one utterance: the counts are jiwer's, and no table of pairs is held."""
    rng = random.Random(0)
    known = [f"{first}{number}" for number in range(300) for first in "abcdefghij"]
    said = rng.choices(known, k=26_000)
    heard = []
    for word in said:
        draw = rng.random()
        heard += [] if draw < 0.05 else [rng.choice(known)] if draw < 0.15 else [word, word] if draw < 0.2 else [word]
    heard[9000:9000] = ["thank", "you"] * 1000  # as recognisers do in silence
    text, answer = " ".join(said), " ".join(heard)
    jiwer_counts = jiwer.process_words([text], [answer])
    tracemalloc.start()
    rates = score_pairs([text], [answer], AS_WRITTEN)
    skips = skip_rates(rates.utterances, samples=20)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    counted = (rates.substitutions, rates.deletions, rates.insertions)
    assert counted == (jiwer_counts.substitutions, jiwer_counts.deletions, jiwer_counts.insertions)
    assert skips.skipped == rates.deletions and 900 < skips.repeated < 1500
    assert peak < 64, peak  # one byte for each pair of words would be 700 MiB


def some_results() -> Results:
    """A TTS row that lost a phrase, said one again and has no answer to the last; recordings, and ASR."""
    again = f"bin {TEXTS[0]}"
    faults = {"length": 1, "loop": 0, "silence": 2, "non_finite": 0}
    rows = [row("tts", [again, "set", None], 12.5, faults=faults), row("ground_truth", TEXTS)]
    return Results("A", rows + [row("asr", [TEXTS[0], "", TEXTS[2]], 12.5)])


def test_it_stands_in_results_table_and_report(tmp_path) -> None:
    results = some_results()
    save_results(results, tmp_path)
    tts, truth, asr = load_results(tmp_path).rows
    assert (tts.skips, tts.faults) == (results.rows[0].skips, results.rows[0].faults)
    assert truth.skips.skipped == truth.skips.repeated == 0 and asr.skips is None
    n_words, lost = tts.n_words, tts.skips.skipped
    assert lost == tts.deletions and tts.skips.skipped_phrases == 2 and tts.skips.repeated == 1
    spoken, written = groups_of(results.rows)
    table = skips_in(spoken)
    assert table.headings == [
        "system", "words skipped", "phrases skipped", "words repeated", "not ended", "looping", "silent",
    ]  # fmt: skip
    (of_truth, of_tts) = table.lines
    assert of_tts[1].startswith(f"{1000 * lost / n_words:.1f} [") and of_tts[3].startswith(f"{1000 / n_words:.1f} [")
    assert of_tts[4:] == ["333.3", "0.0", "666.7"] and of_truth[4:] == ["", "", ""]
    assert skips_in(written) is None
    title = "What went wrong, per 1,000"
    page = write_report(results, tmp_path).read_text()
    assert page.count(f"{title}</h") == page.count(f"{title}</caption>") == 1
    for text in (format_table(results), results_markdown(results)):
        assert text.count(title) == 1


def test_where_there_is_nothing_to_tell_there_is_no_table() -> None:
    results = some_results()
    (codecs,) = groups_of([row("reconstruction", TEXTS, 12.5), row("ground_truth", TEXTS)])
    assert skips_in(codecs) is None
    (older, _) = groups_of([replace(one, skips=None) for one in results.rows])
    assert skips_in(older) is None
    (files_alone,) = groups_of([row("speech", [TEXTS[0], "set", None])])
    assert skips_in(files_alone).headings[-1] == "words repeated"
    again = rescored(results, get_normaliser("whisper-english")).rows[0]
    assert again.skips is not None and again.faults == results.rows[0].faults


def test_predictions_bring_their_faults(files, judge, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(evaluation, "check_judge", lambda config: Lengths.identity)
    write_audio(files / "audio", {"u1": 1, "u4": 5})
    spoken = [
        {"id": "u1", "task": "tts", "text": "bin blue at f two now", "audio": "audio/u1.wav", "faults": ["silence"]},
        {"id": "u4", "task": "tts", "text": "lay green again", "audio": "audio/u4.wav", "faults": ["length"]},
    ]
    (files / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in spoken))
    (files / "predictions.json").write_text(json.dumps({"task": "tts", "answers": "speech", "model": "m"}))
    settings = {"judges": [{"name": "x"}], "bootstrap_samples": 100}
    evaluated = {"run_dir": str(files / "a"), "predictions": [str(files)], "quality": False, "device": "cpu"}
    by_evaluate = load_results(evaluate.run(from_values(evaluate.Config, settings | evaluated))).rows
    scored = {"hypothesis": str(files / "predictions.jsonl"), "output": str(files / "b")}
    by_score = load_results(score.run(from_values(score.Config, settings | scored))).rows
    wanted = {"length": 1, "loop": 0, "silence": 1, "non_finite": 0}
    assert [one.faults for one in by_evaluate + by_score] == [wanted, wanted]
    assert by_evaluate[0].skips == by_score[0].skips


def test_texts_are_joined_and_not_cut(job, tmp_path) -> None:  # noqa: F811
    config = job("synthesize", "pairs", "join=2")
    assert synthesize.plan(config)["texts"] == synthesize.plan(config)["parts they are cut into"] == 3
    alone, pairs = lines(synthesize.run(job("synthesize", "alone"))), lines(synthesize.run(config))
    assert [one["id"] for one in pairs] == ["u0+u1", "u2+u3", "u4+u5"]  # the seventh is left over
    assert pairs[0]["text"] == f"{alone[0]['text']} {alone[1]['text']}" and "segments" not in pairs[0]
    assert soundfile.info(tmp_path / "pairs" / pairs[1]["audio"]).frames > 0
    assert synthesize.plan(job("synthesize", "cut", "join=2", "max_characters=12"))["parts they are cut into"] > 3
    with pytest.raises(ConfigError, match="fewer than 8 texts"):
        synthesize.plan(job("synthesize", "many", "join=8"))
    with pytest.raises(ConfigError, match="join: a prompt of continuation holds more than a text"):
        synthesize.plan(job("synthesize", "more", "join=2", "task=continuation"))
    with pytest.raises(ValueError, match="there must be data or corpus"):
        synthesize.Config(text="a", join=2)
    assert longest_text(config, None) == sys.maxsize
