"""A task added from here alone: its sequences, its training, its marks in a model that speaks already, its scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from slm_tiny import (
    CODES,
    SENTENCES,
    save_llm,
    tiny_model,
    tiny_tokenizer,
    tokens_of,
    translation,
    utterances,
    write_corpus,
)
from typer.testing import CliRunner

from eval.results_file import load_results
from recipes import cli
from recipes.commands import finetune
from recipes.config import ConfigError, from_values
from recipes.runs.pipeline import PipelineConfig, Stage, make_steps
from recipes.scoring import evaluation
from slm.generation import SpeechLM, generate_speech, generate_text
from slm.model.modeling import save_slm
from slm.model.speech_rows import extend_with_speech
from slm.settings import GenerationError, SpeechLimits, TranscribeSettings, tokens_allowed
from slm.tasks import Task, TaskError, get_task, register, registry, tasks
from slm.tasks.registry import Mark, Speech, Text, Turn, UtteranceTokens
from slm.tasks.sequences import example_length, make_example, make_prompt
from slm.training.samples import BatchError, SpeechSamples
from slm.vocabulary import add_marks, add_speech

ECHO = "<|echo|>"


@pytest.fixture
def echo():
    """Speech and its transcript in, the same speech out."""
    task = Task(
        "echo",
        "speech",
        lambda u: Turn([Speech(u.codes), Text(u.text), Mark(ECHO)], [Speech(u.codes)]),
        marks=(ECHO,),
    )
    yield register(task)
    registry._TASKS.pop("echo")


def test_the_tasks_that_are_there() -> None:
    assert {"asr": "text", "tts": "speech"}.items() <= {name: task.answers for name, task in tasks().items()}.items()
    with pytest.raises(TaskError, match="'sing' is unknown; there are asr"):
        get_task("sing")
    with pytest.raises(TaskError, match="there already"):
        register(Task("asr", "speech", get_task("asr").turn))


def test_a_new_task_trains_from_its_parts_alone(echo: Task) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES, CODES], n_codebooks=2, marks=echo.marks)
    rows = utterances()
    samples = SpeechSamples(vocabulary, tokens_of(vocabulary, tokenizer, rows), {"echo": 1.0, "tts": 0.5})
    assert samples.task_names == ("echo", "tts") and len(samples.lengths) == 2 * len(rows)
    example = samples.example(0, None)
    assert len(example) == samples.lengths[0]
    names = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    assert names.count("<|speech|>") == 2 and names.count(ECHO) == 1
    learnt = [name for name, label in zip(names, example.labels, strict=True) if label != -100]
    codes = [name for name in names if name.startswith("<|speech_")]
    assert learnt == [*codes[: len(codes) // 2], "<|/speech|>", "<|eos|>"]


def test_a_prompt_needs_its_own_parts_only(echo: Task) -> None:
    vocabulary = add_speech(tiny_tokenizer(), [CODES], marks=echo.marks)
    spoken = UtteranceTokens(codes=np.array([[3, 0]]), text=np.array([5]))
    assert make_prompt(vocabulary, get_task("tts"), UtteranceTokens(text=np.array([5]))).size
    with pytest.raises(TaskError, match="tts: an utterance without codes"):
        make_example(vocabulary, get_task("tts"), UtteranceTokens(text=np.array([5])))
    with pytest.raises(TaskError, match="echo: an utterance without text"):
        make_prompt(vocabulary, echo, UtteranceTokens(codes=spoken.codes))
    assert example_length(vocabulary, echo, spoken) == len(make_example(vocabulary, echo, spoken))


def test_an_unknown_task_is_refused() -> None:
    vocabulary = add_speech(tiny_tokenizer(), [CODES])
    with pytest.raises(BatchError, match="task_weights: task 'sing' is unknown"):
        SpeechSamples(vocabulary, [UtteranceTokens(np.array([[1]]), np.array([5]))], {"sing": 1.0})


def test_a_plan_names_the_key_of_an_unknown_task(tmp_path) -> None:
    values = {"corpus": str(write_corpus(tmp_path / "corpus")), "model": str(save_llm(tmp_path / "llm"))}
    values |= {"run_dir": str(tmp_path / "run"), "task_weights": {"sing": 1.0}, "precision": "fp32"}
    with pytest.raises(
        ConfigError, match="task_weights: task 'sing' is unknown; there are asr, continuation, instruct, mt, st, tts"
    ):
        finetune.plan(from_values(finetune.Config, values))


def test_a_new_task_goes_the_whole_road(tmp_path) -> None:
    """A third task and its mark from outside: fine-tuned by the recipe, saved, loaded, generated from."""
    backwards = "<|backwards|>"

    def turn(utterance: UtteranceTokens) -> Turn:
        text = None if utterance.text is None else utterance.text[::-1]
        return Turn([Speech(utterance.codes), Mark(backwards)], [Text(text)])

    task = register(Task("backwards", "text", turn, marks=(backwards,)))
    try:
        corpus = write_corpus(tmp_path / "corpus")
        config = from_values(
            finetune.Config,
            {
                "run_dir": str(tmp_path / "run"),
                "corpus": str(corpus),
                "model": str(save_llm(tmp_path / "llm")),
                "task_weights": {"backwards": 1.0},
                "noise": {"replace": 0.0, "drop": 0.0},
                "training": {"steps": 60, "tokens_per_step": 512, "pack_length": 128, "learning_rate": 5e-3},
                "precision": "fp32",
            },
        )
        finetune.run(config)
        speech_lm = SpeechLM.load(tmp_path / "run" / "model")
        rows = utterances()[: len(SENTENCES)]
        prompts = [UtteranceTokens(codes=row["audio_codes"]) for row in rows]
        answers = generate_text(speech_lm, task, prompts)
        ids = [speech_lm.vocabulary.encode_text(speech_lm.text_tokenizer, row["text"]) for row in rows]
        reversed_texts = [speech_lm.text_tokenizer.decode(item[::-1]).strip() for item in ids]
        assert [output.text for output in answers] == reversed_texts
        assert speech_lm.vocabulary.mark_id(backwards) == speech_lm.vocabulary.size - 1
        with pytest.raises(GenerationError, match="call generate_text"):
            generate_speech(speech_lm, task, prompts, [SpeechLimits(1.0)] * len(prompts))
    finally:
        registry._TASKS.pop("backwards")


def test_a_model_that_speaks_keeps_what_it_has_learnt(echo: Task) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    before = add_speech(tokenizer, [CODES])
    extend_with_speech(model, before, seed=0)
    tables = [m.weight.detach().clone() for m in (model.get_input_embeddings(), model.get_output_embeddings())]
    after = add_marks(tokenizer, before, echo.marks)
    extend_with_speech(model, after, seed=0, first_id=before.size)
    for old, module in zip(tables, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        assert torch.equal(module.weight[: before.size], old[: before.size])
        assert module.weight[after.mark_id(ECHO)].abs().sum() > 0


def test_a_text_s_budget_counts_what_the_prompt_holds(echo: Task) -> None:
    vocabulary = add_speech(tiny_tokenizer(), [CODES], marks=echo.marks, frame_rate=12.5)
    spoken = UtteranceTokens(codes=np.zeros((1, 25), int), text=np.zeros(7, int))
    settings = TranscribeSettings(min_tokens=3, tokens_per_s=10.0)
    ask = {
        "speech": Task("a", "text", lambda u: Turn([Speech(u.codes)], [Text(u.text)])),
        "text": Task("b", "text", lambda u: Turn([Text(u.text)], [Text(u.text)])),
        "both": Task("c", "text", lambda u: Turn([Speech(u.codes), Text(u.text)], [Text(u.text)])),
    }
    allowed = {name: tokens_allowed(vocabulary, task, spoken, settings) for name, task in ask.items()}
    assert allowed == {"speech": 3 + 20, "text": 3 + 2 * 7, "both": 3 + 20 + 2 * 7}
    assert [(task.prompt_holds_speech, task.prompt_holds_text) for task in ask.values()] == [
        (True, False), (False, True), (True, True),
    ]  # fmt: skip


PLUGIN = """
from slm.tasks import Task, register
from slm.tasks.registry import Mark, Speech, Text, Turn

register(Task(
    "gloss",
    "text",
    lambda u: Turn([Speech(u.codes), Mark("<|gloss|>")], [Text(u.columns["translation"])]),
    marks=("<|gloss|>",),
    columns=("translation",),
    reference="translation",
))
register(Task(
    "parrot",
    "speech",
    lambda u: Turn([Speech(u.codes), Mark("<|parrot|>")], [Speech(u.codes)]),
    marks=("<|parrot|>",),
))
"""


@pytest.fixture
def slm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The command line in a working directory that holds `my_tasks.py`; what it says where it succeeds."""
    (tmp_path / "my_tasks.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words: str, code: int = 0) -> str:
        found = CliRunner().invoke(cli.app, list(words))
        assert found.exit_code == code, found.output
        return " ".join(found.output.split())

    yield run
    for name in ("gloss", "parrot"):
        registry._TASKS.pop(name, None)
    sys.modules.pop("my_tasks", None)


def learn(slm: Callable[..., str], task: str, corpus: Path, steps: int = 150) -> str:
    """Fine-tunes the tiny LLM for one task of the plugin; returns the model's folder."""
    training = f"{{steps: {steps}, tokens_per_step: 512, pack_length: 128, learning_rate: 5e-3}}"
    slm(
        "finetune", "run_dir=slm", f"corpus={corpus}", f"model={save_llm(Path('llm'))}", "plugins=[my_tasks]",
        f"task_weights={{{task}: 1}}", f"training={training}", "noise={replace: 0, drop: 0}", "precision=fp32",
    )  # fmt: skip
    return "slm/model"


def test_a_task_that_writes_goes_from_a_corpus_to_the_report(slm, tmp_path) -> None:
    """Words in another order, from a file outside: its column, its mark, its answers and a row for them."""
    corpus = write_corpus(tmp_path / "codes", columns=["translation"])
    model = learn(slm, "gloss", corpus)
    slm("transcribe", "task=gloss", f"model={model}", f"corpus={corpus}", "run_dir=said", "plugins=[my_tasks]")
    lines = [json.loads(line) for line in (tmp_path / "said" / "predictions.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["gloss"] * 4
    assert [line["reference"] for line in lines] == [translation(text) for text in SENTENCES]
    assert [line["hypothesis"] for line in lines] == [translation(text) for text in SENTENCES]
    slm("evaluate", "predictions=[said]", "run_dir=scores", "bootstrap_samples=50")  # needs no plugin
    (row,) = load_results(tmp_path / "scores").rows
    assert (row.name, row.system, row.wer, row.n_scored) == ("SLM gloss", "slm-gloss", 0.0, 4)
    assert row.generation["answers"] == "text" and row.generation["reference"] == "translation"
    page = (tmp_path / "scores" / "report.html").read_text()
    assert "What SLM gloss writes" in page and ">SLM gloss<" in page


class OneText:
    """A judge that reads the same in all it hears."""

    sampling_rate = 16_000
    name = "one text"
    identity: dict[str, Any] = {"name": "one text", "kind": "test", "revision": "1", "decoding": "none"}

    def transcribe(self, audios: list[np.ndarray], sampling_rate: int) -> list[str]:
        return ["text one"] * len(audios)


def test_a_task_that_speaks_goes_from_recordings_to_the_report(
    slm, tmp_path, tiny_tokenizer, make_corpus, monkeypatch
) -> None:
    """A parrot, from a file outside: recordings to codes, its answers to sound, and a row for what a judge reads."""
    manifest = make_corpus(3)
    data = f"[{{path: {manifest}}}]"
    slm("encode", "run_dir=codes", f"tokenizer={tiny_tokenizer}", f"data={data}", "precision=fp32", "num_workers=0")
    model = learn(slm, "parrot", tmp_path / "codes", steps=3)
    common = ["synthesize", "task=parrot", f"model={model}", "plugins=[my_tasks]", "split=train"]
    slm(*common, "corpus=codes", "run_dir=coded")
    slm(*common, f"data.path={manifest}", "run_dir=recorded")  # the same codes, made anew
    for n in range(3):
        coded, recorded = (soundfile.read(f"{run}/audio/train{n}.wav")[0] for run in ("coded", "recorded"))
        assert len(coded) and np.array_equal(coded, recorded)
    first = json.loads((tmp_path / "coded" / "predictions.jsonl").read_text().splitlines()[0])
    assert (first["task"], first["error"]) == ("parrot", None) and first["text"].startswith("text ")
    monkeypatch.setattr(evaluation, "check_judge", lambda config: OneText.identity)
    monkeypatch.setattr("recipes.scoring.judges.load_judge", lambda config, device: OneText())
    slm(
        "evaluate", "predictions=[recorded]", f"data={data}", "split=train", "judges=[{name: one text}]",
        "run_dir=scores", "bootstrap_samples=50", "normaliser=none",
    )  # fmt: skip
    results = load_results(tmp_path / "scores")
    assert [(row.name, row.system) for row in results.rows] == [
        ("ground truth", "ground_truth"), ("SLM parrot", "slm-parrot"),
    ]  # fmt: skip
    assert results.rows[1].n_scored == 3 and results.rows[1].difference.against == "ground truth"
    assert [clip.label for clip in results.samples[0].clips] == ["ground truth", "SLM parrot"]
    assert "SLM parrot" in (tmp_path / "scores" / "report.html").read_text()


def test_what_cannot_be_asked_is_said_with_the_way_out(slm, tmp_path) -> None:
    corpus = write_corpus(tmp_path / "codes")
    model = str(save_llm(tmp_path / "llm"))
    tokenizer, llm = tiny_tokenizer(), tiny_model("qwen2", len(tiny_tokenizer()) + 5)
    vocabulary = add_speech(tokenizer, [CODES], fingerprint="f" * 64, tokenizer="tiny")
    extend_with_speech(llm, vocabulary, seed=0)
    save_slm(llm, tokenizer, vocabulary, tmp_path / "slm")

    def refuses(*words: str) -> str:
        return slm(*words, "plugins=[my_tasks]", code=2)

    asked = [f"model={tmp_path / 'slm'}", f"corpus={corpus}", "run_dir=out"]
    assert "answers in speech: `slm synthesize task=tts` asks it" in refuses("transcribe", "task=tts", *asked)
    assert "answer in text: asr, gloss, instruct, mt, st" in refuses("transcribe", "task=tts", *asked)
    assert "`slm transcribe task=gloss` asks it" in refuses("synthesize", "task=gloss", *asked)
    assert "'sing' is unknown; there are asr, continuation, gloss, instruct, mt, parrot, st, tts" in refuses(
        "synthesize", "task=sing", *asked
    )
    one = refuses("transcribe", "task=gloss", *asked)
    assert "has not learnt gloss (its vocabulary has no <|gloss|>)" in one
    one = refuses("synthesize", "say this", "task=parrot", asked[0])
    assert "a prompt of parrot holds speech, which TEXT has not" in one
    one = refuses("finetune", f"model={model}", f"corpus={corpus}", "task_weights={gloss: 1}", "run_dir=run")
    assert "gloss reads translation, and corpus" in one and "encode it with data.0.columns=[translation]" in one
    with pytest.raises(TaskError, match="'x': reference 'topic' must be text or one of its columns"):
        register(Task("x", "text", get_task("asr").turn, reference="topic"))


def test_plugins_are_found_in_the_working_directory_and_by_stages_of_a_pipeline(slm, tmp_path) -> None:
    assert "no module 'my_task'" in slm("transcribe", "x.wav", "plugins=[my_task]", code=2)
    (tmp_path / "broken.py").write_text("import a_library_that_is_not_there")
    assert "broken imports a_library_that_is_not_there" in slm("transcribe", "x.wav", "plugins=[broken]", code=2)
    (tmp_path / "code.py").write_text("")  # Python's own `code` would be taken for it
    assert "rename your file" in slm("transcribe", "x.wav", "plugins=[code]", code=2)
    assert "gloss" not in tasks()
    make_steps(PipelineConfig(str(tmp_path / "runs"), [Stage("finetune", set=["plugins=[my_tasks]"])]))
    assert {"gloss", "parrot"} <= set(tasks())
    told = slm("finetune", "--help")
    assert "plugins=[my_tasks]" in told and "my_tasks.py in the working directory" in told
