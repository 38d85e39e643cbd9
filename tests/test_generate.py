"""`slm generate task=NAME`: the two commands by one name, and the tasks that have no command of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from slm_tiny import SENTENCES, metadata, save_llm, translation, utterances, write_corpus
from typer.testing import CliRunner

from eval.results_file import load_results
from eval.text.translation import can_score_translations
from recipes import cli
from recipes.scoring import evaluation
from slm.corpus import CodedCorpusWriter
from slm.generation import SpeechLM, generate_speech
from slm.settings import SpeechLimits, SynthesizeSettings
from slm.tasks import get_task
from slm.tasks.continuation import split_codes
from slm.tasks.registry import UtteranceTokens
from tokenizer import load_tokenizer


@pytest.fixture
def slm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The command line in a folder of its own; what it says where it ends as it should."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, code: int = 0) -> str:
        found = CliRunner().invoke(cli.app, list(words))
        assert found.exit_code == code, found.output
        return " ".join(found.output.split())

    return run


def learn(slm: Callable[..., str], tasks: str, corpus: Path, steps: int) -> str:
    """Fine-tunes the tiny LLM; returns the model's folder."""
    training = f"{{steps: {steps}, tokens_per_step: 512, pack_length: 128, learning_rate: 5e-3}}"
    slm(
        "finetune", "run_dir=slm", f"corpus={corpus}", f"model={save_llm(Path('llm'))}", f"task_weights={tasks}",
        f"training={training}", "noise={replace: 0, drop: 0}", "precision=fp32",
    )  # fmt: skip
    return "slm/model"


@pytest.fixture
def spoken(slm, tiny_tokenizer, make_corpus) -> tuple[str, Path]:
    """A model that has seen, hardly, three tasks on the codes of a tokenizer that can speak; and the recordings."""
    manifest = make_corpus(3)
    data = f"data=[{{path: {manifest}}}]"
    slm("encode", "run_dir=codes", f"tokenizer={tiny_tokenizer}", data, "precision=fp32", "num_workers=0")
    return learn(slm, "{asr: 1, tts: 1, continuation: 1}", Path("codes"), steps=3), manifest


def lines_of(run: str) -> list[dict]:
    """The lines of a run's predictions without how long each took."""
    lines = [json.loads(line) for line in (Path(run) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line.pop("wall_s") >= 0 for line in lines)
    return lines


def facts_of(run: str) -> dict:
    """Its sidecar without what was measured of time."""
    facts = json.loads((Path(run) / "predictions.json").read_text(encoding="utf-8"))
    return {key: value for key, value in facts.items() if not key.endswith(("_s", "_factor"))}


@pytest.mark.parametrize(("task", "command"), [("asr", "transcribe"), ("tts", "synthesize")])
def test_the_two_that_everyone_knows_are_the_same_under_their_names(slm, spoken, task: str, command: str) -> None:
    model, manifest = spoken
    more = {"asr": ["decoding.num_beams=2"], "tts": ["decoding.top_k=5", "decoding.seed=3"]}[task]
    asked = ["task=tts"] if task == "tts" else []  # without it the model's own, which is no part of the configuration
    for source in ("corpus=codes", f"data.path={manifest}"):
        common = [f"model={model}", source, "split=train", *more]
        slm(command, *asked, *common, "run_dir=known")
        slm("generate", f"task={task}", *common, "run_dir=named")
        assert lines_of("known") == lines_of("named") and len(lines_of("named")) == 3
        assert facts_of("known") == facts_of("named")
        for name in ("config.yaml", *(f"audio/train{n}.wav" for n in range(3 if task == "tts" else 0))):
            known, named = (Path(run, name).read_bytes().replace(run.encode(), b"") for run in ("known", "named"))
            assert known == named
        assert "is complete: skipped" in slm(command, *asked, *common, "run_dir=named")
        for run in ("known", "named"):
            Path(run).rename(f"{run}-{len(source)}")


def test_a_decoder_trained_further_speaks_for_a_model_in_a_folder_of_its_own(slm, spoken, tiny_tokenizer) -> None:
    """Codes are the same, so that the model is not refused; a folder that holds the other sound is."""
    model, asked = f"model={spoken[0]}", ["corpus=codes", "split=train", "limit=1"]
    slm("synthesize", model, *asked, "run_dir=spoken")
    shutil.copytree(tiny_tokenizer, "further")
    tokenizer = load_tokenizer("further")
    with torch.no_grad():
        for parameter in tokenizer.decoder.parameters():
            parameter.mul_(1.1)
    tokenizer.save_pretrained(tiny_tokenizer)
    try:
        assert "voice, tokenizer" in slm("synthesize", model, *asked, "run_dir=spoken", code=2)
        slm("synthesize", model, *asked, "run_dir=further-spoken")
    finally:
        shutil.copytree("further", tiny_tokenizer, dirs_exist_ok=True)
    (one,), (other,) = lines_of("spoken"), lines_of("further-spoken")
    assert one == other
    sounds = [Path(run, one["audio"]).read_bytes() for run in ("spoken", "further-spoken")]
    assert sounds[0] != sounds[1]


def test_inputs_without_a_key_go_where_the_task_s_prompt_needs_them(slm, spoken) -> None:
    model, manifest = f"model={spoken[0]}", spoken[1]
    recording = str(manifest.parent / "train1.flac")
    asked = (["generate", "task=asr"], ["transcribe"])
    named, known = (CliRunner().invoke(cli.app, [*words, recording, model]).stdout for words in asked)
    assert named == known and named.strip()
    slm("generate", "task=tts", "text one", model, "-o", "named.wav", "options.pause_s=0.1")
    slm("synthesize", "text one", model, "-o", "known.wav", "pause_s=0.1")
    assert Path("named.wav").read_bytes() == Path("known.wav").read_bytes()
    slm("generate", "task=continuation", recording, model, "-o", "named.flac")
    slm("synthesize", "task=continuation", f"files=[{recording}]", model, "-o", "known.flac")
    assert Path("named.flac").read_bytes() == Path("known.flac").read_bytes()
    plan = slm("generate", "task=tts", "text one", model, "--dry-run")
    assert "slm synthesize task=tts" in plan and "named" not in plan


def test_what_it_cannot_do_is_said_with_the_way_out(slm, spoken) -> None:
    model, recording = f"model={spoken[0]}", str(spoken[1].parent / "train0.flac")

    def refused(*words: str) -> str:
        return slm("generate", *words, model, code=2)

    assert "task: not set; give task=NAME, one of asr, continuation, instruct, mt, st, tts" in refused("x.wav")
    assert "'sing' is unknown; there are asr, continuation, instruct, mt, st, tts" in refused("task=sing", "x.wav")
    assert "takes one text, got 2; put it in quotes: 'text one'" in refused("task=tts", "text", "one")
    assert "has not learnt st (its vocabulary has no <|translate|>)" in refused("task=st", recording)
    found = refused("task=asr", recording, "decoding.temprature=1", "options.pause_s=1")
    assert "decoding.temprature: unknown key; did you mean `temperature`?" in found
    assert "pause_s: unknown key" in found and "`slm transcribe`, which task asr runs as" in found
    assert "output: unknown key" in refused("task=asr", recording, "-o", "x.wav")
    assert "options.split: is a key of its own; give split=" in refused("task=tts", "a", "options.split=x")
    assert "no-such.wav" in refused("task=continuation", "no-such.wav", "--dry-run")
    two = refused("task=continuation", recording, recording)
    assert "run_dir: needed with several files" in two
    text = slm("synthesize", "say this", "task=continuation", model, code=2)
    assert "holds speech, which TEXT has not; give files=[FILE], data.path" in text
    text = slm("synthesize", f"files=[{recording}]", model, code=2)
    assert 'a prompt of tts holds a text, which FILE has not; give "TEXT", data.path' in text
    helped = slm("generate", "--help")
    for example in ("task=asr recording.wav", 'task=tts "the weather', "task=continuation", "task=st"):
        assert f"slm generate {example}" in helped


def test_a_continuation_is_learnt_until_it_is_what_followed(slm, tmp_path) -> None:
    corpus = write_corpus(tmp_path / "codes", n=4)
    model = learn(slm, "{continuation: 1}", corpus, steps=250)
    speech_lm, task = SpeechLM.load(model), get_task("continuation")
    for share in (0.3, 0.5, 0.7):
        parts = [split_codes(row["audio_codes"][:1], share) for row in utterances(4)]
        prompts = [UtteranceTokens(codes=first) for first, _ in parts]
        limits = [SpeechLimits(5.0)] * 4
        outputs = generate_speech(speech_lm, task, prompts, limits, SynthesizeSettings(temperature=0.0))
        assert [output.finish_reason for output in outputs] == ["stop"] * 4
        for output, (_, rest) in zip(outputs, parts, strict=True):
            assert output.codes.tolist() == rest.tolist()


def test_speech_without_transcripts_can_be_continued(slm, tmp_path) -> None:
    corpus = CodedCorpusWriter(tmp_path / "codes", metadata())
    corpus.write_shard("train", 0, 1, [row | {"text": ""} for row in utterances(4)])
    corpus.finish()
    model = learn(slm, "{continuation: 1}", tmp_path / "codes", steps=2)
    speech_lm = SpeechLM.load(model)
    assert speech_lm.vocabulary.trained_on is None
    prompts = [UtteranceTokens(codes=row["audio_codes"]) for row in utterances(2)]
    assert len(generate_speech(speech_lm, get_task("continuation"), prompts, [SpeechLimits(0.5)] * 2)) == 2
    mixed = slm(
        "finetune", "run_dir=both", f"corpus={tmp_path / 'codes'}", "model=llm", "task_weights={asr: 1}", code=2
    )
    assert "none of the train split's utterances has a text" in mixed


class OneText:
    """A judge that reads the same in all it hears."""

    sampling_rate = 16_000
    name = "one text"
    identity = {"name": "one text", "kind": "test", "revision": "1", "decoding": "none"}

    def transcribe(self, audios: list[np.ndarray], sampling_rate: int) -> list[str]:
        return ["text one"] * len(audios)


def test_a_continuation_goes_from_recordings_to_a_report_without_error_rates(slm, spoken, monkeypatch) -> None:
    model, manifest = spoken
    common = ["generate", "task=continuation", f"model={model}", "split=train", "options.prompt_share=0.25"]
    slm(*common, "corpus=codes", "run_dir=coded")
    slm(*common, f"data.path={manifest}", "run_dir=recorded")  # the same codes, made anew
    for n in range(3):
        coded, recorded = (soundfile.read(f"{run}/audio/train{n}.wav")[0] for run in ("coded", "recorded"))
        assert len(coded) and np.array_equal(coded, recorded)
    lines = lines_of("coded")
    assert [line["text"] for line in lines] == [""] * 3 and lines == lines_of("recorded")
    frames = [4, 5, 7]  # of 0.3, 0.4 and 0.5 s at 12.5 Hz
    frames = [n - max(1, round(n / 4)) for n in frames]
    assert [line["expected_s"] for line in lines] == pytest.approx([n / 12.5 for n in frames], abs=0.1)
    facts = json.loads(Path("coded/predictions.json").read_text())
    assert facts["reference"] is None and facts["expected_s"] == pytest.approx(sum(x["expected_s"] for x in lines))
    monkeypatch.setattr(evaluation, "check_judge", lambda config: OneText.identity)
    monkeypatch.setattr("recipes.scoring.judges.load_judge", lambda config, device: OneText())
    judged = ["evaluate", "judges=[{name: one text}]", "predictions=[coded]", "bootstrap_samples=50", "split=train"]
    slm(*judged, "run_dir=alone")
    slm(*judged, f"data=[{{path: {manifest}}}]", "run_dir=beside", "normaliser=none")
    for run in ("alone", "beside"):
        row = load_results(run).rows[-1]
        assert (row.name, row.wer, row.cer, row.n_words, row.n_scored) == ("SLM continuation", None, None, 0, 3)
        assert [u.hypothesis for u in row.utterances] == ["text one"] * 3 and row.difference is None
        assert any("SLM continuation: it is not known what should be said" in n for n in load_results(run).notes)
        assert "SLM continuation" in Path(run, "report.html").read_text()
    assert load_results("beside").rows[0].wer is not None


def test_a_translation_is_learnt_and_scored(slm, tmp_path) -> None:
    corpus = write_corpus(tmp_path / "codes", columns=["translation"])
    model = learn(slm, "{st: 1}", corpus, steps=150)
    slm("generate", "task=st", f"model={model}", f"corpus={corpus}", "run_dir=said")
    lines = lines_of("said")
    assert [line["hypothesis"] for line in lines] == [translation(text) for text in SENTENCES]
    assert [line["reference"] for line in lines] == [translation(text) for text in SENTENCES]
    slm("evaluate", "predictions=[said]", "run_dir=scores", "bootstrap_samples=50")
    results = load_results("scores")
    (row,) = results.rows
    assert (row.name, row.system, row.wer, row.n_scored) == ("SLM st", "slm-st", 0.0, 4)
    assert "WER and CER of SLM st count every other wording of a translation as errors" in results.notes
    page = Path("scores/report.html").read_text()
    if can_score_translations():
        assert (row.translation.bleu, row.translation.chrf) == (100.0, 100.0)
        assert "Translations" in page and "100.0 [100.0, 100.0]" in page
    else:
        assert row.translation is None and any("need sacrebleu" in note for note in results.notes)
