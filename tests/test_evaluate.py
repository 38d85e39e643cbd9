"""``slm evaluate`` end to end on tiny models: every row, every failure counted, nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from eval.judges.config import JudgeConfig
from eval.protocol import Protocol
from eval.protocol import TestSet as Scored
from eval.results_file import load_results
from eval.schema import make_row
from eval.speech.measures import registry
from eval.speech.measures.registry import Measure, register_measure
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes.commands import evaluate
from recipes.config import ConfigError, dump_config, load_config
from recipes.scoring import audio_pass, codec_systems, evaluation
from recipes.scoring.codec_systems import precision_of
from recipes.scoring.evaluation import Config
from recipes.scoring.predictions import predicted_system, read_predictions
from tokenizer import LMSPTConfig, LMSPTModel, load_tokenizer
from tokenizer.data.utterances import AudioError, DataSource
from tokenizer.teacher.recogniser import Recogniser, RecogniserConfig, save_recogniser

RATE = 16_000
TEXTS = [
    "bin blue at f two now",
    "set red by g five soon",
    "lay green with a nine again",
    "place white in b one please",
]
IDS = [f"u{i}" for i in range(len(TEXTS))]


def seconds(index: int) -> float:
    return 0.5 + 0.25 * index


class LengthJudge:
    """Knows what was said by how long it took: right for whatever keeps a recording's length."""

    sampling_rate = RATE

    def __init__(self, name: str = "length") -> None:
        self.identity: dict[str, Any] = {"name": name, "kind": "test", "revision": "1", "decoding": "none"}
        self.name = name

    def transcribe(self, audios: list[np.ndarray], sampling_rate: int) -> list[str]:
        return [TEXTS[round((len(audio) / sampling_rate - 0.5) / 0.25) % len(TEXTS)] for audio in audios]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a recogniser, both tiny and random, as their own code saves them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    parts = {
        f"{part}_{key}": value
        for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")
        for key, value in (("width", 16), ("layers", 1))
    }
    config = LMSPTConfig(
        n_mels=20, latent_dim=16, codebook_sizes=[32, 16, 16], head_dim=16, trained=True, auxiliary_sampling_rate=8000,
        auxiliary_strides=[80, 4, 2], n_fft=320, **parts,
    )  # fmt: skip
    LMSPTModel(config).save_pretrained(folder / "nano-tiny" / "model")
    recogniser = RecogniserConfig(hidden_size=64, encoder_layers=1, decoder_layers=1, n_mels=80, window_s=1.0)
    save_recogniser(Recogniser.from_scratch(recogniser), folder / "reader" / "model")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four recordings and one line whose file is missing."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "mini"
    folder.mkdir()
    lines = []
    for i, text in enumerate(TEXTS):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(int(seconds(i) * RATE)), RATE)
        lines.append({"id": IDS[i], "audio": f"{i}.wav", "text": text, "split": "test", "duration": seconds(i)})
    lines.append({"id": "gone", "audio": "gone.wav", "text": "one two three", "split": "test", "duration": 1.0})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_predictions(folder: Path, lines: list[dict], **sidecar: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "predictions.json").write_text(json.dumps({"model": "runs/slm/model", "frame_rate": 12.5} | sidecar))
    return folder


@pytest.fixture
def asr(tmp_path: Path) -> Path:
    lines = [
        {"id": i, "task": "asr", "reference": text, "hypothesis": text, "truncated": k == 1, "error": None}
        for k, (i, text) in enumerate(zip(IDS, TEXTS, strict=True))
    ]
    lines[0]["hypothesis"] = "bin <b>white</b> at f two now"
    lines[2] |= {"hypothesis": None, "error": "too long"}
    return write_predictions(tmp_path / "asr", lines, real_time_factor=0.5)


@pytest.fixture
def tts(tmp_path: Path) -> Path:
    """Speaks the second text when asked for the first; its third file is no audio."""
    folder = tmp_path / "tts"
    folder.mkdir()
    lines = []
    for k, (i, text) in enumerate(zip(IDS, TEXTS, strict=True)):
        length = seconds(1) if k == 0 else seconds(k)
        soundfile.write(folder / f"{k}.wav", 0.1 * np.random.default_rng(k).standard_normal(int(length * RATE)), RATE)
        lines.append({"id": i, "task": "tts", "text": text, "audio": f"{k}.wav", "truncated": False, "error": None})
    (folder / "2.wav").write_text("not audio")
    return write_predictions(folder, lines)


def configure(tmp_path: Path, corpus: Path, **changes: Any) -> Config:
    settings = {
        "run_dir": str(tmp_path / "scores"),
        "judges": [JudgeConfig(name="length")],
        "data": [DataSource(path=str(corpus / "manifest.jsonl"))],
        "bootstrap_samples": 100,
        "samples": 2,
        "precision": "fp32",
        "quality": False,
    }
    return Config(**settings | changes)


@pytest.fixture
def length_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "check_judge", lambda config: LengthJudge(config.display_name()).identity)
    monkeypatch.setattr("recipes.scoring.judges.load_judge", lambda config, device: LengthJudge(config.display_name()))


def test_every_row_and_every_failure(tmp_path, models, corpus, asr, tts, length_judge, monkeypatch, capsys) -> None:
    encoded: list[int] = []
    original = codec_systems.encode_batch

    def counted(tokenizer, waveforms, *arguments, **named):
        encoded.append(len(waveforms))
        return original(tokenizer, waveforms, *arguments, **named)

    monkeypatch.setattr(codec_systems, "encode_batch", counted)
    tokenizer = str(models / "nano-tiny" / "model")
    config = configure(
        tmp_path, corpus, tokenizer=tokenizer, predictions=[str(asr), str(tts)],
        judges=[JudgeConfig(name="length"), JudgeConfig(name="second")], quality=True,
    )  # fmt: skip
    folder = evaluate.run(config)
    results = load_results(folder)
    assert sum(encoded) == 4  # every recording once, for two judges
    for judge in ("length", "second"):
        rows = {row.name: row for row in results.rows if row.protocol.judge.get("name") == judge}
        assert list(rows) == ["ground truth", "reconstruction", "semantic reconstruction", "resynthesis", "SLM TTS"]
        for name in list(rows)[:4]:
            row = rows[name]
            assert (row.n_failed, row.n_scored, row.deletions, row.n_words) == (1, 4, 3, 27)  # "gone"
            assert row.wer == pytest.approx(3 / 27)
        spoken = rows["SLM TTS"]
        assert (spoken.n_failed, spoken.n_scored) == (2, 3)  # "gone" and the text file
        assert spoken.deletions == 6 + 3 and spoken.substitutions == 6
        assert spoken.difference.against == "ground truth"  # no fingerprint ties it to this tokenizer
        assert spoken.difference.wer == pytest.approx(spoken.wer - 3 / 27)
        assert rows["reconstruction"].model == "nano-tiny"
        assert rows["reconstruction"].bitrate_bps == pytest.approx(12.5 * (5 + 4 + 4))
        assert rows["semantic reconstruction"].bitrate_bps == pytest.approx(12.5 * 5)
        assert rows["resynthesis"].tokens_per_second == 12.5
        assert rows["resynthesis"].real_time_factor > 0
    own = next(row for row in results.rows if row.system == "asr")
    assert (own.n_failed, own.n_truncated, own.substitutions, own.insertions, own.deletions) == (2, 1, 1, 2, 9)
    assert (own.real_time_factor, own.frame_rate_hz, own.protocol.judge) == (0.5, 12.5, {})
    assert (results.codes[0].n_scored, results.codes[0].n_failed) == (4, 1) and len(results.codes[0].books) == 3
    assert [(q.n_scored, q.n_failed) for q in results.quality] == [(4, 1)] * 3
    assert any("gone.wav" in note for note in results.notes) and any("2.wav" in note for note in results.notes)
    assert [sample.id for sample in results.samples] == ["u0", "u3"]
    assert [clip.label for clip in results.samples[0].clips][0] == "ground truth"
    html = (folder / "report.html").read_text()
    assert "<b>white" not in html and html.count("<audio") == 10
    assert "SLM TTS" in capsys.readouterr().out
    assert len(list(folder.glob("errors-*.txt"))) == len(results.rows)
    assert "FAILED: lay green with a nine again" in next(folder.glob("errors-slm-asr*.txt")).read_text()


def test_a_measure_is_taken_of_all_audio_that_it_is_defined_for(
    tmp_path, models, corpus, tts, length_judge, monkeypatch
) -> None:
    """Of synthesised speech too, where it needs no recording or none in step; of the recordings what needs none."""
    monkeypatch.setattr(registry, "_MEASURES", dict(registry._MEASURES))
    register_measure(Measure("seconds", "seconds", "Length", "none", lambda a: len(a) / RATE, needs_reference=False))
    register_measure(
        Measure("ratio", "ratio", "Ratio of the lengths", "none", lambda a, b: len(a) / len(b), time_aligned=False)
    )
    changes = {"quality": True, "measures": ["seconds", "ratio", "mel_distance_db"], "predictions": [str(tts)]}
    config = configure(tmp_path, corpus, tokenizer=str(models / "nano-tiny" / "model"), **changes)
    found = {item.system: item for item in load_results(evaluate.run(config)).quality}
    assert list(found) == ["ground_truth", "reconstruction", "semantic_reconstruction", "resynthesis", "tts"]
    assert set(found["ground_truth"].values) == {"seconds"} and set(found["tts"].values) == {"seconds", "ratio"}
    assert found["ground_truth"].values["seconds"] == pytest.approx(np.mean([seconds(i) for i in range(4)]))
    spoken = [(seconds(1), seconds(0)), (seconds(1), seconds(1)), (seconds(3), seconds(3))]
    assert found["tts"].values["ratio"] == pytest.approx(np.mean([one / other for one, other in spoken]))
    assert (found["tts"].n_scored, found["tts"].n_failed) == (3, 2)
    assert found["reconstruction"].values["ratio"] == pytest.approx(1.0)
    assert "Audio quality" in (Path(config.run_dir) / "results.md").read_text()

    config = configure(tmp_path / "alone", corpus, data=[], **changes)  # predictions without a test set
    (alone,) = load_results(evaluate.run(config)).quality
    assert alone.values["seconds"] > 0 and alone.values["ratio"] is None
    assert alone.notes == ["ratio: there is no recording to compare with (3 clips)"]


def test_the_bootstrap_draws_speakers_where_there_are_enough(tmp_path, corpus, length_judge, monkeypatch) -> None:
    def rows(speakers: list[str], **changes: Any) -> list[Any]:
        manifest = corpus / "manifest.jsonl"
        lines = [json.loads(line) for line in manifest.read_text().splitlines()]
        named = [line | {"speaker": speaker} for line, speaker in zip(lines, speakers, strict=True)]
        manifest.write_text("".join(json.dumps(line) + "\n" for line in named))
        name = f"{'-'.join(speakers)}{changes}"
        return load_results(evaluate.run(configure(tmp_path / name, corpus, judges=[JudgeConfig("x")], **changes))).rows

    def drawn(found: list[Any]) -> set[tuple[str, int | None]]:
        return {(row.protocol.resampled, row.protocol.n_speakers) for row in found}

    five, two, unknown = list("abcde"), list("aaabb"), ["a", "b", "c", "d", ""]
    assert drawn(rows(five)) == {("utterances", 5)}
    assert drawn(rows(unknown)) == {("utterances", None)}
    (one,) = rows(two, resample="speakers")
    assert drawn([one]) == {("speakers", 2)}
    # A resample of two speakers is one of them twice, or both: 0 of 18 words, 3 of 27, or 3 of 9 ("gone" failed).
    assert one.interval == (0.0, pytest.approx(3 / 9)) and [u.speaker for u in one.utterances] == two
    monkeypatch.setattr("recipes.scoring.protocols.ENOUGH_SPEAKERS", 5)
    assert drawn(rows(five, title="again")) == {("speakers", 5)}
    assert drawn(rows(five, resample="utterances")) == {("utterances", 5)}
    with pytest.raises(ConfigError, match="resample=speakers: .*speaker is not known; name speakers in its manifest"):
        rows(unknown, resample="speakers")
    with pytest.raises(ConfigError, match="resample=speakers: .*one speaker alone"):
        rows(list("aaaaa"), resample="speakers")


def test_listings_whose_titles_differ_in_signs_alone_are_both_kept(tmp_path) -> None:
    protocol = Protocol("asr", {}, "none", "1", Scored("t", "0", 2), bootstrap_samples=20)
    rates = score_pairs(["one two", "three"], ["one", "three"], get_normaliser("none"))
    audio_pass.write_listings(
        tmp_path, [make_row(name, "asr", "m", protocol, rates) for name in ("SLM ASR", "SLM (ASR)")]
    )
    titles = {path.read_text().splitlines()[0] for path in tmp_path.glob("errors-*.txt")}
    assert titles == {"# SLM ASR, m", "# SLM (ASR), m"}


def test_a_real_judge_folder_is_read_both_ways(tmp_path, models, corpus) -> None:
    name = str(models / "reader" / "model")
    judges = [JudgeConfig(name=name, label="attention"), JudgeConfig(name=name, label="ctc", decoding="ctc")]
    results = load_results(evaluate.run(configure(tmp_path, corpus, judges=judges, samples=0)))
    assert [row.protocol.judge["kind"] for row in results.rows] == ["seq2seq", "ctc-head"]
    assert all(row.n_scored == 4 and row.wer is not None and row.interval for row in results.rows)
    assert not results.samples


@pytest.mark.parametrize(
    ("facts", "topline", "tokens"),
    [
        ({}, "semantic reconstruction", 12.5),
        ({"n_codebooks": 3}, "reconstruction", 37.5),  # made before predictions named their pattern
        ({"n_codebooks": 3, "pattern": "delay", "positions_per_s": 12.5}, "reconstruction", 12.5),
    ],
)
def test_the_decoder_of_tts_is_its_topline(
    tmp_path, models, corpus, tts, length_judge, facts: dict, topline: str, tokens: float
) -> None:
    """That of as many books, however many of them stand at one position of the LLM."""
    from tokenizer import load_tokenizer

    folder = str(models / "nano-tiny" / "model")
    sidecar = json.loads((tts / "predictions.json").read_text())
    sidecar |= {"fingerprint": load_tokenizer(folder).fingerprint("fp32"), **facts}
    (tts / "predictions.json").write_text(json.dumps(sidecar))
    results = load_results(evaluate.run(configure(tmp_path, corpus, tokenizer=folder, predictions=[str(tts)])))
    spoken = next(row for row in results.rows if row.system == "tts")
    assert (spoken.difference.against, spoken.tokens_per_second) == (topline, tokens)


def test_complete_runs_are_skipped_and_changed_inputs_noticed(tmp_path, corpus, asr, length_judge, monkeypatch) -> None:
    config = configure(tmp_path, corpus, judges=[], predictions=[str(asr)])
    folder = evaluate.run(config)
    before = (folder / "results.json").read_bytes()
    monkeypatch.setattr(evaluate, "save_results", lambda *_: pytest.fail("scored again"))
    assert evaluate.run(config) == folder and (folder / "results.json").read_bytes() == before
    lines = (asr / "predictions.jsonl").read_text().replace("<b>white", "<b>green")
    (asr / "predictions.jsonl").write_text(lines)
    with pytest.raises(ConfigError, match="scores of other inputs"):
        evaluate.run(config)


def predictions_of(tmp_path: Path, task: str, answers: str, **sidecar: Any) -> Path:
    """Predictions of a further task: texts of its own for the first two utterances, or their speech as it is."""
    folder = tmp_path / task
    folder.mkdir()
    lines: list[dict] = []
    for k, i in enumerate(IDS[:2]):
        if answers == "text":
            lines.append({"reference": f"eins zwei haus{'ab'[k]}", "hypothesis": f"eins drei haus{'ab'[k]}"})
        else:
            tone = 0.1 * np.random.default_rng(k).standard_normal(int(seconds(k) * RATE))
            soundfile.write(folder / f"{k}.wav", tone, RATE)
            lines.append({"text": TEXTS[k], "audio": f"{k}.wav"})
        lines[-1] |= {"id": i, "task": task, "truncated": False, "error": None}
    return write_predictions(folder, lines, answers=answers, **sidecar)


def test_tasks_are_scored_by_what_they_answer(tmp_path, corpus, asr, tts, length_judge) -> None:
    echo = predictions_of(tmp_path, "echo", "speech")
    st = predictions_of(tmp_path, "st", "text", reference="translation")
    config = configure(tmp_path, corpus, predictions=[str(st), str(echo), str(tts), str(asr)], samples=4)
    folder = evaluate.run(config)
    results = load_results(folder)
    rows = {row.name: row for row in results.rows}
    assert {name: (row.system, row.protocol.task) for name, row in rows.items()} == {
        "ground truth": ("ground_truth", "speech"), "SLM echo": ("slm-echo", "speech"), "SLM TTS": ("tts", "speech"),
        "SLM ASR": ("asr", "asr"), "SLM st": ("slm-st", "slm-st"),
    }  # fmt: skip
    # What echo says is the recordings' own text; it was asked for two of the five.
    assert (rows["SLM echo"].n_scored, rows["SLM echo"].n_failed) == (2, 3)
    assert rows["SLM echo"].difference.against == "ground truth"
    # A translation is scored against the translations, on a test set of that name.
    st = rows["SLM st"]
    assert (st.wer, st.n_scored, st.n_failed) == (pytest.approx(1 / 3), 2, 0)
    assert (st.protocol.test_set.name, st.protocol.test_set.n) == ("mini test, translation", 2)
    assert st.protocol.test_set.sha256 != rows["SLM ASR"].protocol.test_set.sha256
    assert any("no prediction for 3 of 5 utterances, not scored" in note for note in results.notes)
    (truth, *others) = results.samples[0].clips
    assert [clip.label for clip in (truth, *others)] == ["ground truth", "SLM echo", "SLM TTS"]
    assert truth.heard["SLM st"] == "eins drei hausa" and truth.heard["SLM ASR"].startswith("bin <b>white")
    assert {path.name for path in (folder / "samples").iterdir() if path.name.startswith("0-")} == {
        "0-0-ground-truth.flac", "0-2-slm-echo.flac", "0-3-tts.flac",
    }  # fmt: skip
    audio_pass.Players(folder / "samples", [])  # a later start of an evaluation takes away what this one left
    assert not list((folder / "samples").iterdir())
    html = (folder / "report.html").read_text()
    assert "What SLM st writes" in html and "SLM echo" in html
    alone = configure(tmp_path / "alone", corpus, data=[], judges=[], predictions=[str(tmp_path / "st")])
    (row,) = load_results(evaluate.run(alone)).rows
    assert row.wer == st.wer and row.protocol.test_set.name == "st"


def test_speech_with_references_of_its_own_is_read_by_the_judge_and_compared_with_nothing_else(
    tmp_path, corpus, tts, length_judge
) -> None:
    spoken = predictions_of(tmp_path, "s2st", "speech", reference="translation")
    text = (spoken / "predictions.jsonl").read_text()
    (spoken / "predictions.jsonl").write_text(text.replace(TEXTS[0], "eins zwei drei"))
    folder = evaluate.run(configure(tmp_path, corpus, predictions=[str(spoken), str(tts)]))
    rows = {row.name: row for row in load_results(folder).rows}
    row = rows["SLM s2st"]
    assert [(u.id, u.reference) for u in row.utterances] == [("u0", "eins zwei drei"), ("u1", TEXTS[1])]
    assert row.utterances[0].hypothesis == TEXTS[0] and row.utterances[1].errors == 0
    assert row.protocol.task == "speech" and row.protocol.test_set.name == "mini test, translation"
    assert row.difference is None and rows["SLM TTS"].difference.against == "ground truth"


def test_what_a_task_answers_must_be_known(tmp_path, corpus, length_judge) -> None:
    st = predictions_of(tmp_path, "st", "text", reference="translation")
    sidecar = (st / "predictions.json").read_text()
    (st / "predictions.json").write_text(sidecar.replace('"answers": "text", ', ""))
    with pytest.raises(ConfigError, match="'st' answers in text or speech is not known; `answers` in predictions.json"):
        evaluate.run(configure(tmp_path, corpus, predictions=[str(st)]))
    (st / "predictions.json").write_text(sidecar)
    lines = (st / "predictions.jsonl").read_text()
    (st / "predictions.jsonl").write_text(lines.replace("eins zwei hausa", "").replace("eins zwei hausb", ""))
    with pytest.raises(ConfigError, match="task st is scored against 'translation', which no utterance has"):
        evaluate.run(configure(tmp_path, corpus, predictions=[str(st)]))


def test_limit_and_predictions_alone(tmp_path, corpus, asr, length_judge) -> None:
    limited = load_results(evaluate.run(configure(tmp_path / "a", corpus, limit=2, predictions=[str(asr)])))
    assert {row.protocol.test_set.n for row in limited.rows} == {2}
    assert {row.n_failed for row in limited.rows} == {0}
    alone = load_results(evaluate.run(configure(tmp_path / "b", corpus, data=[], judges=[], predictions=[str(asr)])))
    assert [(row.system, row.n_scored, row.n_failed) for row in alone.rows] == [("asr", 3, 1)]
    assert alone.rows[0].protocol.test_set.name == "asr"
    # What only one of two predictions has a line for counts as failed in the other.
    every = [json.loads(line) for line in (asr / "predictions.jsonl").read_text().splitlines()]
    short = write_predictions(tmp_path / "short", every[:1])
    both = configure(tmp_path / "c", corpus, data=[], judges=[], predictions=[str(short), str(asr)])
    rows = load_results(evaluate.run(both)).rows
    assert {(row.protocol.test_set.n, row.n_scored, row.n_failed) for row in rows} == {(4, 1, 3), (4, 3, 1)}


def test_plan_checks_and_changes_nothing(tmp_path, models, corpus, asr, length_judge) -> None:
    config = configure(tmp_path, corpus, tokenizer=str(models / "nano-tiny" / "model"), predictions=[str(asr)])
    facts = evaluate.plan(config)
    assert facts["utterances"] == 5 and facts["reference words"] == 27 and facts["test set"] == "mini test"
    assert not Path(config.run_dir).exists()
    config.strict = True
    with pytest.raises(AudioError, match="gone.wav: no such file"):
        evaluate.plan(config)


def test_configuration_survives_yaml(tmp_path, corpus) -> None:
    config = configure(tmp_path, corpus, tokenizer="nano-12.5hz")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(Config, str(tmp_path / "config.yaml"), []) == config


def test_predictions_of_other_utterances_are_counted_and_absent_ones_are_failed(asr) -> None:
    predictions = read_predictions(str(asr))
    of_these, *others = predictions.lines
    system, notes = predicted_system(predictions, [of_these, "absent"], 16_000)
    assert system.texts["absent"] is None and system.texts[of_these] is not None
    assert any("no prediction for 1 of 2 utterances, counted as failed" in note for note in notes)
    assert any(f"{len(others)} further predictions are not of these utterances, not scored" in note for note in notes)


def test_clear_errors(tmp_path, corpus, asr, tts, length_judge) -> None:
    def refuses(match: str, error: type[Exception] = ConfigError, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            evaluate.run(configure(tmp_path / str(len(list(tmp_path.iterdir()))), corpus, **changes))

    refuses("nothing to score", data=[], judges=[])
    refuses("judges: audio needs a reader", judges=[])
    refuses("judges: audio needs a reader", judges=[], predictions=[str(tts)])
    refuses("called the same", judges=[JudgeConfig(name="x"), JudgeConfig(name="x")])
    refuses("tokenizer needs recordings", data=[], tokenizer="nano-12.5hz", predictions=[str(asr)])
    refuses("nowhere.*does not exist", predictions=[str(tmp_path / "nowhere")])
    refuses("gone.wav: no such file", AudioError, strict=True)
    with pytest.warns(UserWarning, match="preset"):
        refuses("random weights", tokenizer="nano-12.5hz")
    path = asr / "predictions.jsonl"
    good = path.read_text()
    path.write_text(good + good.splitlines()[0] + "\n")
    refuses("line 5: id 'u0' occurs twice", predictions=[str(asr)])
    path.write_text(good + '{"id": "u9", "task"')
    refuses("line 5: not a prediction", predictions=[str(asr)])
    path.write_text(good.replace("bin blue at f", "bin grey at f"))
    refuses("'u0' was 'bin grey", predictions=[str(asr)])
    path.write_text(good.replace('"id": "u', '"id": "v'))
    refuses("has none of the 5 utterances", predictions=[str(asr)])


def test_the_codes_decide_in_which_precision_their_tokenizer_is_heard(tiny_tokenizer):
    model = load_tokenizer(tiny_tokenizer)
    assert precision_of(model, []) == precision_of(model, [None, "another tokenizer's"]) == "fp32"
    assert precision_of(model, [None, model.fingerprint("bf16")]) == "bf16"
