"""BLEU and chrF: sacrebleu's numbers, kept in results and found anew from stored texts."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from eval.protocol import Protocol, TestSet
from eval.report.markdown import results_markdown
from eval.report.tables import measure_tables
from eval.rescoring import rescored
from eval.results_file import load_results, save_results
from eval.schema import Results, Row, make_row
from eval.text import translation
from eval.text.normalisers import get_normaliser
from eval.text.translation import score_translations
from eval.text.wer import score_pairs

needs_sacrebleu = pytest.mark.skipif(
    importlib.util.find_spec("sacrebleu") is None, reason="sacrebleu is not installed (the extra `eval`)"
)
REFERENCES = ["The cat sat on the mat.", "It rained all day long.", "She reads a long book."]
HYPOTHESES = ["the cat sat upon the mat", "It rained all day long.", None]


def translated(normaliser: str) -> Row:
    named = get_normaliser(normaliser)
    rates = score_pairs(REFERENCES, HYPOTHESES, named)
    protocol = Protocol("slm-st", {}, named.name, named.version, TestSet("three", "0" * 64, 3), bootstrap_samples=50)
    scores = score_translations(rates.utterances, samples=50)
    return make_row("SLM st", "slm-st", "tiny", protocol, rates, translation=scores)


@needs_sacrebleu
def test_scores_are_sacrebleu_s_own() -> None:
    import sacrebleu

    scores = translated("none").translation
    said = [text or "" for text in HYPOTHESES]
    assert scores.bleu == pytest.approx(sacrebleu.corpus_bleu(said, [REFERENCES]).score, abs=1e-3)
    assert scores.chrf == pytest.approx(sacrebleu.corpus_chrf(said, [REFERENCES]).score, abs=1e-3)
    assert 0 <= scores.bleu_interval[0] < scores.bleu < 100 and scores.bleu_interval[0] < scores.bleu_interval[1]
    assert "tok:13a" in scores.bleu_signature and "nc:6" in scores.chrf_signature
    assert translated("basic").translation.bleu > scores.bleu  # case and punctuation are not held against it


@needs_sacrebleu
def test_one_utterance_has_no_interval_to_draw() -> None:
    rates = score_pairs(REFERENCES[:1], REFERENCES[:1], get_normaliser("none"))
    scores = score_translations(rates.utterances)
    assert (scores.bleu, scores.bleu_interval) == (100.0, (100.0, 100.0))


@needs_sacrebleu
def test_speakers_are_drawn_where_the_protocol_says_so() -> None:
    rates = score_pairs(REFERENCES * 4, [*HYPOTHESES, *REFERENCES * 3], get_normaliser("none"))
    one = score_translations(rates.utterances, ["a"] * 12)
    assert one.bleu_interval == (one.bleu, one.bleu) and one.chrf_interval == (one.chrf, one.chrf)
    two = score_translations(rates.utterances, ["a"] * 3 + ["b"] * 9)
    assert two.bleu == one.bleu and two.bleu_interval[1] == 100.0 > two.bleu > two.bleu_interval[0]


@needs_sacrebleu
def test_results_keep_them_show_them_and_find_them_anew(tmp_path) -> None:
    results = Results("translations", [translated("none")])
    save_results(results, tmp_path)
    assert load_results(tmp_path).rows[0].translation == results.rows[0].translation
    other = rescored(results, get_normaliser("basic"))
    assert other.rows[0].translation == translated("basic").translation
    (table,) = measure_tables(results)
    assert table.title == "Translations" and table.lines[0][:6] == ["SLM st", "tiny", "three", "none", "2", "1"]
    assert f"{results.rows[0].translation.bleu:.1f} [" in results_markdown(results)


@needs_sacrebleu
def test_without_the_package_nothing_old_is_kept_for_new(monkeypatch) -> None:
    results = Results("translations", [translated("none")])
    monkeypatch.setattr("eval.rescoring.can_score_translations", lambda: False)
    assert rescored(results, get_normaliser("basic")).rows[0].translation is None


def test_rows_of_before_and_of_other_tasks_have_none(tmp_path) -> None:
    rates = score_pairs(REFERENCES, REFERENCES, get_normaliser("none"))
    protocol = Protocol("asr", {}, "none", "1", TestSet("three", "0" * 64, 3), bootstrap_samples=50)
    row = make_row("SLM ASR", "asr", "tiny", protocol, rates)
    save_results(Results("asr", [row]), tmp_path)
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"translation": null', '"cell": ""'))  # as an older version wrote it
    assert load_results(tmp_path).rows == [row] and measure_tables(Results("asr", [replace(row)])) == []
    assert translation.can_score_translations() == (importlib.util.find_spec("sacrebleu") is not None)
