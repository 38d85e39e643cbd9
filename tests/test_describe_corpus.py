"""`slm describe-corpus`: what the LLM is told and answers, and resume; the task `instruct` that learns the answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from slm_tiny import CODES, SENTENCES, metadata, save_llm, tiny_model, tiny_tokenizer, utterances
from typer.testing import CliRunner

from recipes import cli
from recipes.commands import describe_corpus
from recipes.config import ConfigError
from slm.corpus import CodedCorpusWriter
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import IGNORE, make_example, make_prompt
from slm.text_answers import Request, TextAnswer, answer_requests, request_ids
from slm.vocabulary import add_speech
from tokenizer.data.manifest import read_source
from tokenizer.data.utterances import DataSource, Utterance


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Five recordings in two splits, named but never opened; one without a transcript."""
    rows = [
        {"id": f"u{n}", "audio": f"audio/u{n}.wav", "text": text, "speaker": "jo", "duration": 2.5 + n}
        | {"split": "test" if n == 3 else "train", "gender": "female" if n % 2 else ""}
        for n, text in enumerate([*SENTENCES, ""])
    ]
    path = tmp_path / "data" / "manifest.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def configured(manifest: Path, run_dir: Path, model: Path, **changes: object) -> describe_corpus.Config:
    values = {"max_new_tokens": 6, "batch_size": 2, "device": "cpu"} | changes
    return describe_corpus.Config(str(run_dir), [DataSource(path=str(manifest))], model=str(model), **values)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_fact_is_told_and_none_that_is_not_known() -> None:
    row = Utterance("a", "a.wav", "good day", "", None, columns={"gender": "female", "mood": ""})
    assert describe_corpus.describe(row, ["gender", "mood"]) == "good day (Gender: female)"
    assert describe_corpus.describe(Utterance("a", "a.wav", "good day"), []) == "good day"


def test_a_manifest_gets_the_llm_s_own_answers(tmp_path, manifest) -> None:
    llm = save_llm(tmp_path / "llm", chat=True)
    config = configured(manifest, tmp_path / "out", llm)
    assert describe_corpus.plan(config)["utterances"] == 4
    path = describe_corpus.run(config)
    rows = rows_of(path)
    assert [row["id"] for row in rows] == ["u0", "u1", "u2", "u3"]
    for row in rows:
        asked, answered = row["messages"]
        assert (asked["role"], answered["role"]) == ("user", "assistant")
        assert asked["content"].endswith(f"\n{row['instruction']}") and row["text"] in asked["content"]
        assert ("Gender: female" in asked["content"]) == (row["gender"] == "female")
        assert row["instruction"] in config.instructions and answered["content"] == row["answer"]
    # What a manifest's reader makes of it: the same recordings, with the columns that the task reads.
    (found,) = read_source(DataSource(path=str(path), columns=["instruction", "answer"]), "test")
    assert Path(found.audio).resolve() == (manifest.parent / "audio" / "u3.wav").resolve()
    assert found.columns["answer"] == rows[3]["answer"]
    assert not config.data[0].columns  # the configuration stays as the run folder records it


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, manifest, monkeypatch) -> None:
    llm = save_llm(tmp_path / "llm")
    whole = describe_corpus.run(configured(manifest, tmp_path / "whole", llm))
    calls = []

    def cut_off(*given: object) -> list[TextAnswer]:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer_requests(*given)

    config = configured(manifest, tmp_path / "cut", llm)
    monkeypatch.setattr(describe_corpus, "answer_requests", cut_off)
    with pytest.raises(KeyboardInterrupt):
        describe_corpus.run(config)
    record = tmp_path / "cut" / "checkpoints" / "answers.jsonl"
    with record.open("a", encoding="utf-8") as stream:
        stream.write('{"id": "u2", "ans')  # a line that the kill cut short
    assert not (tmp_path / "cut" / "manifest.jsonl").exists()
    resumed = describe_corpus.run(config)
    assert resumed.read_text(encoding="utf-8") == whole.read_text(encoding="utf-8")
    assert len(calls) == 3 and len(calls[2][2]) == 2  # the batch that was cut off alone
    describe_corpus.run(config)
    assert len(calls) == 3
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("bin blue", "bin red"), encoding="utf-8")
    with pytest.raises(ConfigError, match="other contents of data or model"):
        describe_corpus.run(config)


def test_answers_that_are_cut_off_are_counted_and_told(tmp_path, manifest, monkeypatch, caplog) -> None:
    """A model would learn to end where they were cut."""
    llm = save_llm(tmp_path / "llm")
    config = configured(manifest, tmp_path / "cut", llm)
    describe_corpus.run(config)
    assert json.loads((tmp_path / "cut" / "complete.json").read_text())["summary"]["cut_answers"] == 4
    assert "4 of 4 answers were cut off at 6 tokens" in caplog.text and "max_new_tokens" in caplog.text
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen2", len(tokenizer), seed=3)
    assert [answer.ended for answer in answer_requests(model, tokenizer, [Request("bin"), Request("lay red")], 5)] == [
        False,
        False,
    ]
    end = torch.tensor([tokenizer.eos_token_id])
    model.lm_head.register_forward_hook(lambda module, inputs, scores: scores.index_fill(-1, end, 1e4))
    assert answer_requests(model, tokenizer, [Request("bin")], 5) == [TextAnswer("", True)]


@pytest.mark.parametrize("chat", [False, True])
def test_batches_answer_as_singles_do(chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat)
    model = tiny_model("qwen2", len(tokenizer), seed=3)
    requests = [Request("bin"), Request("lay red by a nine please lay red"), Request("set white", (("lay", "red"),))]
    together = answer_requests(model, tokenizer, requests, 5)
    assert together == [answer_requests(model, tokenizer, [request], 5)[0] for request in requests]
    assert len(set(map(len, (request_ids(tokenizer, request) for request in requests)))) > 1
    with pytest.raises(ValueError, match="256 positions; lower max_new_tokens"):
        answer_requests(model, tokenizer, requests, 250)


def test_examples_stand_in_front_and_a_base_llm_s_answer_ends_with_its_line(tmp_path, manifest, monkeypatch) -> None:
    asked, whole = [], answer_requests

    def noted(model, tokenizer, requests, *rest):
        asked.extend(requests)
        assert rest == (6, True)
        return whole(model, tokenizer, requests, *rest)

    monkeypatch.setattr(describe_corpus, "answer_requests", noted)
    colour, digit = "Which colour?", "Which digit?"
    example = describe_corpus.Example("u0", colour, "blue")
    changes = {"instructions": [colour, digit], "examples": [example], "seed": 3}
    config = configured(manifest, tmp_path / "out", save_llm(tmp_path / "llm"), **changes)
    rows = rows_of(describe_corpus.run(config))
    assert {row["instruction"] for row in rows} == {colour, digit} and len(asked) == 4
    for row, request in zip(rows, asked, strict=True):
        shown = ((f"{rows[0]['text']}"), "blue") if row["instruction"] == colour else None
        assert bool(request.examples) == (shown is not None)
        if shown:
            ((text, answer),) = request.examples
            assert shown[0] in text and text.endswith(f"\n{colour}") and answer == shown[1]
    for changes, message in (
        ({"examples": [describe_corpus.Example("u0", "What?", "blue")]}, "examples.0: needs the id"),
        ({"examples": [describe_corpus.Example("u9", colour, "blue")]}, "has no utterance 'u9'"),
        ({"examples": [describe_corpus.Example("u4", colour, "blue")]}, "'u4' has no transcript"),
    ):
        with pytest.raises(ValueError, match=message):
            describe_corpus.plan(configured(manifest, tmp_path / "no", "embedded-lm", instructions=[colour], **changes))


def test_a_line_break_ends_an_answer_of_one_line_alone() -> None:
    tokenizer = tiny_tokenizer()
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    word = tokenizer("bin", add_special_tokens=False)["input_ids"][0]
    model = tiny_model("qwen2", len(tokenizer), seed=3)
    steps = iter([word, line[0], word, word] * 2)
    model.lm_head.register_forward_hook(
        lambda module, inputs, scores: scores.index_fill(-1, torch.tensor([next(steps)]), 1e4)
    )
    assert answer_requests(model, tokenizer, [Request("lay")], 4, one_line=True)[0].ended
    assert not answer_requests(model, tokenizer, [Request("lay")], 4)[0].ended


def test_examples_are_turns_of_a_chat() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    ids = request_ids(tokenizer, Request("lay red", (("set white", "white"),)))
    turns = [("user", "set white"), ("assistant", "white"), ("user", "lay red")]
    messages = [{"role": role, "content": text} for role, text in turns]
    wanted = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert ids == list(wanted["input_ids"])


def test_bad_settings_are_refused_with_the_way_out(tmp_path, manifest) -> None:
    llm = save_llm(tmp_path / "llm")
    for changes, message in [
        ({"instructions": []}, "instructions: give at least one"),
        ({"facts": ["answer"]}, "facts: answer is a column that this command writes"),
        ({"batch_size": 0}, "must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            configured(manifest, tmp_path / "out", llm, **changes)
    manifest.write_text('{"id": "a", "audio": "a.wav"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="none of the utterances has a transcript"):
        describe_corpus.plan(configured(manifest, tmp_path / "out", llm))


def test_loss_is_on_the_answer_alone() -> None:
    tokenizer, task = tiny_tokenizer(), get_task("instruct")
    vocabulary = add_speech(tokenizer, [CODES], fingerprint="f" * 64, tokenizer="tiny", marks=list(task.marks))
    columns = {"instruction": np.array([40, 41]), "answer": np.array([50, 51, 52])}
    utterance = UtteranceTokens(np.array([[0, 7, 3]]), np.array([60]), columns)
    example = make_example(vocabulary, task, utterance)
    kept = example.labels != IGNORE
    assert example.labels[kept].tolist() == [50, 51, 52, vocabulary.end_id]
    prompt = make_prompt(vocabulary, task, UtteranceTokens(utterance.codes, None, {"instruction": np.array([40, 41])}))
    assert example.input_ids[~kept].tolist() == prompt.tolist()
    assert [i for i in prompt.tolist() if i in (40, 41)] == [40, 41] and 60 not in prompt


def test_instructions_are_followed_after_training(tmp_path, monkeypatch) -> None:
    """Two instructions about the same speech get two answers: the model reads both parts of its prompt."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for row in utterances(4):
        words = row["text"].split()
        for name, answer in (("first", words[0]), ("last", words[-1])):
            columns = {"instruction": name, "answer": answer}
            rows.append(row | {"id": f"{row['id']}-{name}", "columns": columns})
    writer = CodedCorpusWriter(tmp_path / "codes", metadata(columns=["instruction", "answer"]))
    for split in ("train", "valid", "test"):
        writer.write_shard(split, 0, 1, rows)
    writer.finish()
    training = "{steps: 150, tokens_per_step: 512, pack_length: 128, learning_rate: 5e-3}"
    for words in (
        ["finetune", "run_dir=slm", "corpus=codes", f"model={save_llm(Path('llm'))}", "task_weights={instruct: 1}",
         f"training={training}", "noise={replace: 0, drop: 0}", "precision=fp32", "normaliser=none"],
        ["generate", "task=instruct", "model=slm/model", "corpus=codes", "run_dir=said"],
    ):  # fmt: skip
        found = CliRunner().invoke(cli.app, words)
        assert found.exit_code == 0, found.output
    said = rows_of(Path("said/predictions.jsonl"))
    assert [line["hypothesis"] for line in said] == [row["columns"]["answer"] for row in rows]
    assert {line["reference"] for line in said} == {row["columns"]["answer"] for row in rows}
