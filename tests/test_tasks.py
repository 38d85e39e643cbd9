"""A task added from here alone: its sequences, its training, its marks in a model that speaks already."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slm_tiny import CODES, SENTENCES, save_llm, tiny_model, tiny_tokenizer, utterances, write_corpus

from recipes.commands import finetune
from recipes.config import ConfigError, from_values
from slm.generation import GenerationError, SpeechLM, generate_speech, generate_text
from slm.modeling import extend_with_speech
from slm.tasks import Task, TaskError, get_task, register, registry, tasks
from slm.tasks.registry import Mark, Speech, Text, Turn, Utterance
from slm.tasks.sequences import example_length, make_example, make_prompt
from slm.training.batches import BatchError, SpeechSamples
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
    texts = [vocabulary.encode_text(tokenizer, row["text"]) for row in rows]
    samples = SpeechSamples(vocabulary, [row["audio_codes"] for row in rows], texts, {"echo": 1.0, "tts": 0.5})
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
    spoken = Utterance(codes=np.array([[3, 0]]), text=np.array([5]))
    assert make_prompt(vocabulary, get_task("tts"), Utterance(text=np.array([5]))).size
    with pytest.raises(TaskError, match="tts: an utterance without codes"):
        make_example(vocabulary, get_task("tts"), Utterance(text=np.array([5])))
    with pytest.raises(TaskError, match="echo: an utterance without text"):
        make_prompt(vocabulary, echo, Utterance(codes=spoken.codes))
    assert example_length(vocabulary, echo, spoken) == len(make_example(vocabulary, echo, spoken))


def test_an_unknown_task_is_refused() -> None:
    vocabulary = add_speech(tiny_tokenizer(), [CODES])
    with pytest.raises(BatchError, match="task_weights: task 'sing' is unknown"):
        SpeechSamples(vocabulary, [np.array([[1]])], [np.array([5])], {"sing": 1.0})


def test_a_plan_names_the_key_of_an_unknown_task(tmp_path) -> None:
    values = {"corpus": str(write_corpus(tmp_path / "corpus")), "model": str(save_llm(tmp_path / "llm"))}
    values |= {"run_dir": str(tmp_path / "run"), "task_weights": {"sing": 1.0}, "precision": "fp32"}
    with pytest.raises(ConfigError, match="task_weights: task 'sing' is unknown; there are asr, tts"):
        finetune.plan(from_values(finetune.Config, values))


def test_a_new_task_goes_the_whole_road(tmp_path) -> None:
    """A third task and its mark from outside: fine-tuned by the recipe, saved, loaded, generated from."""
    backwards = "<|backwards|>"

    def turn(utterance: Utterance) -> Turn:
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
        prompts = [Utterance(codes=row["audio_codes"]) for row in rows]
        answers = generate_text(speech_lm, task, prompts)
        ids = [speech_lm.vocabulary.encode_text(speech_lm.text_tokenizer, row["text"]) for row in rows]
        reversed_texts = [speech_lm.text_tokenizer.decode(item[::-1]).strip() for item in ids]
        assert [output.text for output in answers] == reversed_texts
        assert speech_lm.vocabulary.mark_id(backwards) == speech_lm.vocabulary.size - 1
        with pytest.raises(GenerationError, match="call generate_text"):
            generate_speech(speech_lm, task, prompts, [1.0] * len(prompts))
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
