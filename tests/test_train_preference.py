"""``slm train-preference`` end to end on a tiny model, with judges that read letters out of the sound."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from preference_tiny import TEXTS, lines
from slm_tiny import write_corpus

from eval.judges.config import JudgeError
from recipes.commands import train_preference
from recipes.config import ConfigError
from recipes.inference import batches
from recipes.preference.config import RewardSettings
from recipes.preference.pairs import best_and_worst
from recipes.preference.samples import Sample, Speaker, reward_of
from recipes.preference.texts import read_texts
from recipes.runs.run_folder import RunFolder
from slm.generation import SpeechLM, synthesize_codes
from slm.model.modeling import describe_llm

pytest_plugins = ["preference_tiny"]  # its fixtures


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_reward_is_less_for_what_is_heard_wrong_too_long_too_short_and_without_end() -> None:
    settings = RewardSettings(length_weight=0.5, length_tolerance=0.25, stop_penalty=2.0)
    assert reward_of(settings, 0.0, 1.2, failed=False) == 0.0
    assert reward_of(settings, 0.3, None, failed=False) == -0.3
    assert reward_of(settings, 7.0, 1.0, failed=False) == -1.0
    assert reward_of(settings, 0.0, 2.5, failed=False) == pytest.approx(-0.5 * np.log(2))
    assert reward_of(settings, 0.0, 0.4, failed=False) == pytest.approx(-0.5 * np.log(2))
    assert reward_of(settings, 1.0, 1.0, failed=True) == -3.0
    assert np.isfinite(reward_of(settings, 1.0, 0.0, failed=True))


def test_a_pair_is_the_best_answer_that_ended_against_the_worst() -> None:
    def sample(reward: float, finish_reason: str = "stop") -> Sample:
        return Sample(np.array([[1]]), finish_reason, False, "", 0.0, 1.0, reward)

    answers = [sample(-0.5), sample(-0.1), sample(-0.1), sample(-2.0, "length")]
    assert best_and_worst(answers, 0.1) == (answers[1], answers[3])
    assert best_and_worst(answers[1:3], 0.1) is None  # a tie
    assert best_and_worst([sample(-1.5, "loop"), sample(-2.0, "length")], 0.1) is None


def test_texts_that_are_held_out_are_not_learnt_from(configure, start, tmp_path) -> None:
    vocabulary = describe_llm(str(start / "model")).vocabulary
    texts = read_texts(configure("run"), vocabulary)
    assert len(texts.held_out) == 2 and texts.left_out == 1
    assert {text.said for text in texts.train} == set(TEXTS) - {text.said for text in texts.held_out}
    few = read_texts(configure("run", "limit=3"), vocabulary)
    assert len(few.train) == 3 and set(few.train) < set(texts.train) and few.held_out == texts.held_out
    (tmp_path / "more.txt").write_text("\n".join([*TEXTS, *TEXTS, "abc" * 9]), encoding="utf-8")
    again = read_texts(configure("run", f"texts={tmp_path / 'more.txt'}"), vocabulary)
    assert len(again.train) == 6  # each once, and none longer than what the model knows
    # A corpus brings its own held-out texts.
    write_corpus(tmp_path / "codes")
    long = dataclasses.replace(vocabulary, trained_on=None)
    with pytest.raises(ConfigError, match="no text is left to learn from"):
        read_texts(configure("run", "texts=''", f"corpus={tmp_path / 'codes'}", "eval_texts=4"), long)
    of_corpus = read_texts(configure("run", "texts=''", f"corpus={tmp_path / 'codes'}", "eval_texts=3"), long)
    assert len(of_corpus.held_out) == 3 and len(of_corpus.train) == 1
    with pytest.raises(ConfigError, match="eval_texts"):
        read_texts(configure("run", "eval_texts=8"), vocabulary)


def test_dpo_from_the_plan_to_a_model_that_speaks(configure, ears, tmp_path, caplog) -> None:
    caplog.set_level("INFO", "slm")
    config = configure("run")
    plan = train_preference.plan(config)
    assert not ears and not (tmp_path / "run").exists()
    assert plan["answers drawn to learn from"].startswith("24 ") and plan["evaluations"] == 3
    assert plan["judge"] == "ear: hears 30 answers" and plan["second judge"] == "other: hears 6 answers"
    folder = train_preference.run(config)
    first, second = ears
    assert (first.heard, second.heard) == (30, 6)
    counts, *pairs = lines(tmp_path / "run" / "pairs.jsonl")
    assert counts["texts"] == 6 and counts["samples"] == 24
    assert counts["pairs"] == len(pairs) and counts["pairs"] + counts["ties"] + counts["failed"] == 6
    assert f"{len(pairs)} pairs of 24 answers to 6 texts; dropped: {counts['ties']} ties" in caplog.text
    for row in pairs:
        assert row["chosen"]["reward"] >= row["rejected"]["reward"] + 0.05 and row["chosen"]["finish_reason"] == "stop"
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    evaluations = [row for row in rows if "eval_judge_wer" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    names = {"judge_wer", "judge_cer", "second_judge_wer", "second_judge_cer", "kl", "length_ratio", "reward"}
    names |= {f"{name}_per_1000" for name in ("truncated", "loop", "silent", "stop_failures")}
    assert {f"eval_{name}" for name in names} <= evaluations[0].keys()
    assert evaluations[0]["eval_kl"] == pytest.approx(0, abs=1e-6) and evaluations[2]["eval_kl"] > 1e-4
    assert "step 0: eval_judge_wer" in caplog.text
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    steps = [row for row in rows if "reward_margin" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4] and steps[3]["reward_margin"] > steps[0]["reward_margin"]
    slm = SpeechLM.load(folder)
    assert slm.vocabulary.trained_on.longest_text == 8 and slm.vocabulary.trained_on.tasks == ("tts",)
    assert synthesize_codes(slm, ["abcabcab"])[0].codes.shape[0] == 1
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"] == "train-preference"
    assert {"eval_second_judge_wer", "eval_kl"} <= RunFolder(tmp_path / "run").summary.keys()
    before = weights(folder)
    assert train_preference.run(config) == folder and weights(folder) == before and len(ears) == 2


def test_reference_log_probabilities_are_those_of_a_fresh_model(configure, start, tmp_path) -> None:
    train_preference.run(configure("run"))
    slm = SpeechLM.load(start / "model")
    _, *rows = lines(tmp_path / "run" / "pairs.jsonl")
    for row in rows:
        for side in ("chosen", "rejected"):
            prompt = [*slm.vocabulary.before, *slm.vocabulary.encode_text(slm.text_tokenizer, row["said"])]
            prompt += [slm.vocabulary.mark_id("<|synthesize|>"), *slm.vocabulary.between, slm.vocabulary.speech_id]
            ids = [*slm.vocabulary.ids_from_codes(np.array(row[side]["codes"]))]
            ids += [slm.vocabulary.speech_end_id] if row[side]["finish_reason"] == "stop" else []
            sequence = torch.tensor([[*prompt, *ids]])
            with torch.no_grad():
                scores = slm.model(input_ids=sequence).logits[0].log_softmax(-1)
            expected = sum(float(scores[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))
            assert row[side]["reference_log_probability"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("overrides", [(), ("method=grpo",), ("method=grpo", "lora.rank=2", "grpo.updates=2")])
def test_a_killed_run_goes_on_to_the_same_model(configure, tmp_path, monkeypatch, overrides) -> None:
    """Killed while answers are drawn (DPO), then after step 3 of 4, whose checkpoint is that of step 2."""
    whole = train_preference.run(configure("whole", *overrides))
    rows = lines(tmp_path / "whole" / "metrics.jsonl")
    save, saved = batches.Outcome.save, []

    def killed(self, path: Path) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(self, path)

    if not overrides:
        with monkeypatch.context() as patch:
            patch.setattr(batches.Outcome, "save", killed)
            with pytest.raises(KeyboardInterrupt):
                train_preference.run(configure("killed", *overrides))
        assert saved and not (tmp_path / "killed" / "pairs.jsonl").exists()

    def killed_step(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_preference.TrainerProgress, "on_step_end", killed_step)
        with pytest.raises(KeyboardInterrupt):
            train_preference.run(configure("killed", *overrides))
    assert not (tmp_path / "killed" / "model").exists()
    again = train_preference.run(configure("killed", *overrides))
    assert weights(again) == weights(whole)
    if not overrides:
        assert (tmp_path / "killed" / "pairs.jsonl").read_bytes() == (tmp_path / "whole" / "pairs.jsonl").read_bytes()
    figures = [
        [{name: value for name, value in row.items() if name != "time" and "runtime" not in name} for row in found]
        for found in (
            [row for row in read if "eval_kl" in row] for read in (rows, lines(tmp_path / "killed" / "metrics.jsonl"))
        )
    ]
    assert figures[0] == figures[1] and [row["step"] for row in figures[0]] == [0, 2, 4]


def test_a_run_that_is_killed_before_its_first_checkpoint_tells_its_start_once(
    configure, tmp_path, monkeypatch
) -> None:
    def killed_step(self, args, state, control, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_preference.TrainerProgress, "on_step_end", killed_step)
        with pytest.raises(KeyboardInterrupt):
            train_preference.run(configure("run"))
    train_preference.run(configure("run"))
    steps = [row["step"] for row in lines(tmp_path / "run" / "metrics.jsonl") if "eval_kl" in row]
    assert steps == [0, 2, 4]


def test_grpo_makes_what_the_judge_hears_better(configure, tmp_path) -> None:
    """By both judges where the second agrees; the reward and its parts stand beside the loss."""
    settings = ["steps=24", "tokens_per_step=700", "learning_rate=4e-3", "eval_steps=24", "save_steps=24"]
    own = ["method=grpo", "grpo.group_size=8", "grpo.kl_weight=0.01", *(f"training.{item}" for item in settings)]
    config = configure("run", *own)
    plan = train_preference.plan(config)
    assert "8 for each text of a step" in plan["answers drawn to learn from"]
    train_preference.run(config)
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    first, last = (row for row in rows if "eval_kl" in row)
    assert last["eval_judge_cer"] < first["eval_judge_cer"] - 10 and last["eval_reward"] > first["eval_reward"] + 0.1
    assert last["eval_kl"] > first["eval_kl"]
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert len(rewards) == 24 and np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1


def test_what_is_drawn_at_a_step_does_not_depend_on_its_micro_batches(configure, tmp_path, monkeypatch) -> None:
    """Accumulation may change on resume; a step may hold a text twice."""
    rewards, speak, asked = {}, Speaker.speak, []

    def noted(self, model, texts, settings, keys):
        asked.append([text.said for text in texts])
        return speak(self, model, texts, settings, keys)

    monkeypatch.setattr(Speaker, "speak", noted)
    for accumulation in (1, 3):
        own = ["steps=2", "warmup_steps=2", "eval_steps=0", "tokens_per_step=900"]
        own = [f"training.{item}" for item in (*own, f"gradient_accumulation={accumulation}")]
        train_preference.run(configure(str(accumulation), "method=grpo", "grpo.kl_weight=0", *own))
        rows = lines(tmp_path / str(accumulation) / "metrics.jsonl")
        rewards[accumulation] = [(row["reward"], row["loss"]) for row in rows if "reward" in row]
    assert len(rewards[1]) == 2 and max(asked[0].count(text) for text in asked[0]) == 8 and asked[0] != asked[2]
    assert np.array(rewards[3]) == pytest.approx(np.array(rewards[1]), abs=1e-5)


def test_adapters_are_merged_into_a_model_and_the_start_is_kept(configure, start, tmp_path) -> None:
    before = weights(start / "model")
    folder = train_preference.run(configure("run", "lora.rank=2", "method=grpo"))
    assert weights(start / "model") == before
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    merged, start_model = SpeechLM.load(folder).model, SpeechLM.load(start / "model").model
    assert type(merged) is type(start_model)
    same = [torch.equal(a, b) for a, b in zip(merged.parameters(), start_model.parameters(), strict=True)]
    assert not all(same) and any(same)  # norms have no adapters


def test_what_cannot_run_is_refused_before_anything_is_drawn(configure, ears, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("recipes.preference.samples.generate_speech", lambda *a, **k: pytest.fail("something is drawn"))
    for judge in ("judge", "second_judge"):
        for name in ("absent", "torn"):
            with pytest.raises(JudgeError, match=name):
                train_preference.run(configure("run", f"{judge}.name={name}"))
    with pytest.raises(ConfigError, match="second_judge: ear is the judge that is learnt from"):
        train_preference.run(configure("run", "second_judge.name=ear", "second_judge.label=another"))
    shared = {"name": "copy", "kind": "test", "weights_sha256": "ab"}
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="second_judge: copy is the judge"):
        patch.setattr(train_preference, "check_judge", lambda config: shared | {"decoding": config.decoding})
        train_preference.run(configure("run", "second_judge.name=copy", "second_judge.decoding=ctc"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="3 problems") as raised:
        train_preference.plan(configure("run", "judge.name=absent", "texts=nowhere.txt", "normaliser=nothing"))
    assert all(word in str(raised.value) for word in ("absent", "nowhere.txt", "nothing"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        train_preference.plan(configure("run"))


@pytest.mark.parametrize(
    ("override", "names"),
    [
        (["sampling.temperature=0"], "sampling"),
        (["sampling.retries=1"], "sampling"),
        (["dpo.samples=1"], "dpo.samples"),
        (["grpo.group_size=1"], "grpo.group_size"),
        (["method=grpo", "sampling.guidance=2"], "guidance"),
        (["method=grpo", "grpo.updates=3"], "grpo.updates"),
        (["training.deepspeed=deepspeed-zero2"], "deepspeed"),
        (["training.keep=best"], "keep_by"),
        (["eval_texts=0"], "eval_texts"),
        (["weights=bf16"], "weights"),
        (["corpus=somewhere"], "corpus and texts"),
    ],
)
def test_settings_that_make_no_sense_are_refused(configure, override, names) -> None:
    with pytest.raises(ConfigError, match=names):
        configure("run", *override)


def test_a_text_lm_is_told_to_learn_speech_first(configure, start) -> None:
    with pytest.raises(ValueError, match="slm finetune"):
        train_preference.run(configure("run", f"model={start / 'llm'}"))


def test_the_best_by_the_second_judge_is_kept(configure, tmp_path) -> None:
    train_preference.run(configure("run", "training.keep=best", "training.keep_by=second_judge_cer"))
    rows = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "eval_kl" in row]
    summary = RunFolder(tmp_path / "run").summary
    assert summary["eval_second_judge_cer"] == min(row["eval_second_judge_cer"] for row in rows if row["step"])


def test_texts_without_a_pair_are_an_error_that_says_what_to_do(configure, tmp_path) -> None:
    with pytest.raises(
        ConfigError, match=r"0 pairs of 24 answers to 6 texts; dropped: \d ties.*dpo.samples.*dpo.margin"
    ):
        train_preference.run(configure("run", "dpo.margin=9"))
    kept = list((tmp_path / "run" / "checkpoints").glob("batch-*.json"))
    assert kept and not (tmp_path / "run" / "pairs.jsonl").exists()


def test_other_texts_or_another_judge_are_not_mixed_into_a_run(configure, start, tmp_path) -> None:
    train_preference.run(configure("run"))
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:5]), encoding="utf-8")
    with pytest.raises(ConfigError, match="different configuration"):
        train_preference.run(configure("run", f"texts={tmp_path / 'few.txt'}"))
    text = (start / "texts.txt").read_text(encoding="utf-8")
    try:
        (start / "texts.txt").write_text(text + "acbacbac\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="model, texts, judges"):
            train_preference.run(configure("run"))
    finally:
        (start / "texts.txt").write_text(text, encoding="utf-8")


def test_sampling_follows_from_the_text_and_not_from_its_batch(configure, tmp_path) -> None:
    """The same pairs, whatever is drawn together (their padding moves scores by rounding alone)."""
    train_preference.run(configure("many"))
    train_preference.run(configure("few", "sampling.batch_size=4"))
    many, few = (lines(tmp_path / name / "pairs.jsonl")[1:] for name in ("many", "few"))
    assert [row["chosen"]["codes"] for row in many] == [row["chosen"]["codes"] for row in few]
