"""Multi-token prediction from training to answers: what heads learn, how they are kept, what they propose."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from slm_tiny import CODES, save_llm, tokens_of, utterances, write_corpus
from test_delay import StandIn, grown
from test_slm_training import KillAt, losses, same_weights
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from recipes.commands import export, finetune, synthesize, train_lm, train_preference
from recipes.config import ConfigError, load_config
from recipes.inference import setup
from slm.generation import SpeechLM, generate_speech, stream_speech, synthesize_codes
from slm.lora import LoraSettings, add_lora
from slm.modeling import load_llm, save_slm
from slm.multi_token import (
    FILE_NAME,
    MultiTokenError,
    MultiTokenSettings,
    multi_token_heads_of,
    predicted_tokens,
    set_multi_token_heads,
)
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings
from slm.speech_rows import extend_with_speech
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import IGNORE, answer, make_example
from slm.training.batches import ONE_ROW, pack
from slm.training.config import TrainingConfig, TrainingError
from slm.training.multi_token import further_places
from slm.training.objectives import check_objective, finetuning_objective
from slm.training.samples import NoiseConfig, SpeechSamples
from slm.training.train import train
from slm.vocabulary import add_marks

OPTIONS = {"tokens_per_step": 260, "pack_length": 64, "learning_rate": 3e-3, "warmup_steps": 2, "log_steps": 1}
TEXTS = ["bin blue at f two now", "lay red by a nine please", "a", "set white in z four soon", "place green"]


def with_heads(speech_lm: SpeechLM, tokens: int = 4, noise: float = 0.0) -> SpeechLM:
    """The same with heads, whose blocks hold noise where asked for."""
    set_multi_token_heads(speech_lm.model, MultiTokenSettings(tokens))
    torch.manual_seed(5)
    for block in multi_token_heads_of(speech_lm.model).blocks:
        torch.nn.init.normal_(block.weight, std=noise)
    return speech_lm


def plain(n: int = 1, kind: str = "qwen2") -> SpeechLM:
    return grown(n, kind, "semantic" if n == 1 else "flatten")


def samples_of(speech_lm: SpeechLM, n: int = 12, noise: float = 0.1) -> SpeechSamples:
    vocabulary = speech_lm.vocabulary
    tokens = tokens_of(vocabulary, speech_lm.text_tokenizer, utterances(n, books=vocabulary.n_codebooks))
    return SpeechSamples(vocabulary, tokens, {"asr": 1.0, "tts": 1.0}, NoiseConfig(noise, noise))


def fit(folder: Path, speech_lm: SpeechLM, callbacks=(), samples=None, tokens: int = 3, weight=1.0, **options):
    samples = samples or samples_of(speech_lm)
    config = TrainingConfig(
        **(OPTIONS | {"steps": 6, "eval_steps": 0, "save_steps": 2} | options),
        multi_token=MultiTokenSettings(tokens, weight) if tokens else None,
    )
    return train(
        speech_lm.model,
        samples,
        samples if config.eval_steps else None,
        config,
        folder,
        seed=7,
        callbacks=callbacks,
        objective=finetuning_objective(speech_lm.vocabulary, config, 1.0),
    )


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> SpeechLM:
    """Has learnt four sentences and their codes by heart, and what comes three codes on."""
    speech_lm = with_heads(plain(), 3)
    folder, options = tmp_path_factory.mktemp("checkpoints"), {"tokens_per_step": 400, "warmup_steps": 10}
    samples = samples_of(speech_lm, n=4, noise=0.0)
    fit(folder, speech_lm, samples=samples, steps=120, save_steps=120, learning_rate=1e-2, **options)
    speech_lm.model.eval()
    return speech_lm


def plain_losses(speech_lm: SpeechLM, example) -> list[torch.Tensor]:
    """Sums of an example's cross-entropies at distance 1, 2, ..., written out place by place."""
    model, heads, vocabulary = speech_lm.model, multi_token_heads_of(speech_lm.model), speech_lm.vocabulary
    rows = range(vocabulary.first_id, vocabulary.size)
    states = model.get_decoder()(input_ids=torch.from_numpy(example.input_ids)[None]).last_hidden_state[0]
    head, labels = model.get_output_embeddings(), example.labels.tolist()
    codes = {i for ids in vocabulary.speech_ids() for i in ids.tolist()} | {vocabulary.speech_end_id}
    sums = [F.cross_entropy(head(states[:-1]), torch.tensor(labels[1:]), reduction="sum", ignore_index=IGNORE)]
    for distance in range(2, heads.tokens + 1):
        total = torch.zeros(())
        for place in range(len(labels) - distance):
            if all(label in codes for label in labels[place + 1 : place + distance + 1]):
                logits = head(heads(distance, states[place]))[rows.start : rows.stop]
                total = total + F.cross_entropy(logits, torch.tensor(labels[place + distance] - rows.start))
        sums.append(total)
    return sums


@pytest.mark.parametrize(("kind", "books"), [("qwen2", 1), ("llama", 2), ("gemma", 1)])
def test_the_loss_is_that_of_each_answer_alone_packed_or_padded(tmp_path, kind: str, books: int) -> None:
    """Against sums written out: two answers in speech and one in text side by side, and plain text between them."""
    speech_lm = with_heads(plain(books, kind), 3, noise=0.3)
    model, vocabulary, weights = speech_lm.model.eval(), speech_lm.vocabulary, [1.0, 0.5, 2.0, 0.7]
    tokens = tokens_of(vocabulary, speech_lm.text_tokenizer, utterances(3, books=books))
    asked = zip(("tts", "asr", "tts"), tokens, strict=True)
    examples = [make_example(vocabulary, get_task(task), one) for task, one in asked]
    examples.append(answer(np.array([5]), np.array([6, 7, 8])))
    with torch.no_grad():
        each = [plain_losses(speech_lm, example) for example in examples]
    assert each[1][1:] == each[3][1:] == [0, 0] and each[0][1] > 0
    own = [w * sums[0] for w, sums in zip(weights, each, strict=True)]
    wanted = sum(own) + sum(w * 0.6 / 2 * sum(sums[1:]) for w, sums in zip(weights, each, strict=True))
    trainer = fit(tmp_path, copy.deepcopy(speech_lm), steps=1, weight=0.6)
    trainer.model.load_state_dict(model.state_dict())
    for pack_length in (0, 64, ONE_ROW):
        batch = pack(examples, weights, pack_length)
        found = {}
        for training in (True, False):
            trainer.model.train(training)
            with torch.no_grad():
                found[training] = trainer._weighted_sum(trainer.model, batch)[0]
        torch.testing.assert_close(found[True], wanted, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found[False], sum(own), atol=1e-3, rtol=1e-4)
        figures = trainer._further_figures(trainer._beside)
        for distance in (2, 3):
            n_said = sum(weights[i] * (tokens[i].codes.shape[1] * books + 2 - distance) for i in (0, 2))
            total = sum(w * sums[distance - 1] for w, sums in zip(weights, each, strict=True))
            assert figures[f"token_{distance}_loss"] == pytest.approx(float(total) / n_said, rel=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_under_lora_adapters_new_rows_and_heads_move_and_nothing_else(tmp_path, kind: str) -> None:
    """And the loss is that of the whole model, before the first step."""
    speech_lm = with_heads(plain(1, kind), 3, noise=0.3)
    example = make_example(speech_lm.vocabulary, get_task("tts"), samples_of(speech_lm).utterances[0])
    with torch.no_grad():
        wanted = plain_losses(speech_lm, example)
    model = add_lora(speech_lm.model, speech_lm.vocabulary, LoraSettings(rank=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = fit(tmp_path, SpeechLM(model, speech_lm.text_tokenizer, speech_lm.vocabulary))
    after = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    kinds = ("lora_A", "lora_B", "trainable_tokens_delta", "multi_token_heads.modules_to_save")
    assert all(any(kind in name for kind in kinds) for name in moved), moved
    assert all(any(kind in name for name in moved) for kind in kinds)
    assert not any("lora" in name for name in before if "multi_token_heads" in name)
    trainer.model.load_state_dict(before)
    trainer.model.train()
    with torch.no_grad():
        total, _ = trainer._weighted_sum(trainer.model, pack([example], [1.0], 0))
    torch.testing.assert_close(total, wanted[0] + sum(wanted[1:]) / 2, atol=1e-3, rtol=1e-4)


def test_no_head_looks_beyond_an_end() -> None:
    """Two answers end to end, and the stretches of one that is given word by word."""
    vocabulary = plain().vocabulary
    code, end, eos = int(vocabulary.offsets[0]), vocabulary.speech_end_id, vocabulary.end_id
    labels = torch.tensor(
        [[IGNORE, code, code + 1, end, eos, IGNORE, code, end, IGNORE, IGNORE, code, code, code, end]]
    )
    found = {distance: there[0].nonzero()[:, 0].tolist() for distance, there in further_places(labels, vocabulary, 4)}
    assert found == {2: [0, 1, 5, 9, 10, 11], 3: [0, 9, 10], 4: [9]}


def test_heads_and_all_else_learn_and_accumulation_changes_nothing(tmp_path) -> None:
    speech_lm = with_heads(plain(), 3)
    start = copy.deepcopy(speech_lm)
    before = copy.deepcopy(speech_lm.model.state_dict())
    one = fit(tmp_path / "1", speech_lm)
    moved = {name for name, value in one.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(before) and sum("multi_token_heads" in name for name in moved) == 2
    many = fit(tmp_path / "3", start, gradient_accumulation=3, gradient_checkpointing=True)
    assert losses(one)[0] > losses(one)[-1]
    assert losses(one) == pytest.approx(losses(many), abs=1e-4)
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path) -> None:
    def fresh() -> SpeechLM:
        return with_heads(plain(), 3)

    whole = fit(tmp_path / "whole", fresh(), gradient_accumulation=2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", fresh(), callbacks=[KillAt(5)], gradient_accumulation=2)
    resumed = fit(tmp_path / "killed", fresh(), gradient_accumulation=2)
    assert same_weights(whole, resumed)
    assert losses(whole)[4:] == losses(resumed)[-2:]


def settings(tokens: int = 1, temperature: float = 0.0, **options) -> SynthesizeSettings:
    return SynthesizeSettings(temperature=temperature, multi_token=tokens, **options)


def same_outputs(one: list, other: list) -> bool:
    return all(
        np.array_equal(a.codes, b.codes) and a.finish_reason == b.finish_reason for a, b in zip(one, other, strict=True)
    )


def test_what_was_learnt_comes_back_in_fewer_passes(learnt: SpeechLM) -> None:
    rows = utterances(4)
    for n in (2, 3):
        spoken = synthesize_codes(learnt, [row["text"] for row in rows], settings(n))
        assert all(
            output.finish_reason == "stop" and np.array_equal(output.codes, row["audio_codes"][:1])
            for output, row in zip(spoken, rows, strict=True)
        )
        per_pass = sum(output.codes.size for output in spoken) / sum(output.n_passes for output in spoken)
        assert per_pass > 0.7 * n


@pytest.mark.parametrize("temperature", [0.0, 1.2])
@pytest.mark.parametrize(("kind", "books"), [("qwen2", 1), ("llama", 1), ("gemma", 2), ("qwen2", 3)])
def test_the_codes_are_those_of_a_token_a_pass(kind: str, books: int, temperature: float) -> None:
    """Whatever heads propose; rows end by themselves, by their budget and in a loop, and accept different numbers."""
    speech_lm = with_heads(plain(books, kind), 4, noise=0.1)
    limits = {"min_seconds": 0.2, "seconds_per_character": 0.06, "min_seconds_per_character": 0.01, "loop_s": 0.7}
    limits |= {"top_k": 9, "top_p": 0.95} if temperature else {}
    wanted = synthesize_codes(speech_lm, TEXTS, settings(1, temperature, **limits))
    for n in (2, 4):
        many = synthesize_codes(speech_lm, TEXTS, settings(n, temperature, **limits))
        assert same_outputs(wanted, many)
        alone = [synthesize_codes(speech_lm, [text], settings(n, temperature, **limits))[0] for text in TEXTS]
        assert same_outputs(wanted, alone)
        assert [output.n_passes for output in alone] == [output.n_passes for output in many]
        least = [-(-output.codes.size // n) for output in many]
        assert all(low <= output.n_passes <= output.codes.size + 1 for low, output in zip(least, many, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_of_what_was_learnt_too_where_much_is_accepted(learnt: SpeechLM, temperature: float) -> None:
    """Rows whose passes give now one token and now three; other texts than those learnt among them."""
    texts = [*TEXTS, "bin red by z nine again", "set blue"]
    limits = {"min_seconds": 0.5, "seconds_per_character": 0.1}
    wanted = synthesize_codes(learnt, texts, settings(1, temperature, **limits))
    many = synthesize_codes(learnt, texts, settings(3, temperature, **limits))
    assert same_outputs(wanted, many)
    assert sum(output.n_passes for output in many) < 0.8 * sum(output.codes.size for output in wanted)


def test_a_window_of_attention_sees_the_same_tokens() -> None:
    """Answers longer than the window, in rows of different length."""
    text_tokenizer = plain().text_tokenizer
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"intermediate_size": 48, "head_dim": 16, "sliding_window": 6, "vocab_size": len(text_tokenizer) + 40}
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=kinds)).eval()
    speech_lm = with_heads(SpeechLM(model, text_tokenizer, plain().vocabulary), 3, noise=0.1)
    extend_with_speech(model, speech_lm.vocabulary, seed=0)
    limits = {"min_seconds": 2.0, "seconds_per_character": 0.02, "min_seconds_per_character": 0.1, "loop_s": 0}
    wanted = synthesize_codes(speech_lm, TEXTS, settings(1, 1.0, **limits))
    assert min(output.codes.shape[1] for output in wanted) > 1 and max(o.codes.shape[1] for o in wanted) > 20
    assert same_outputs(wanted, synthesize_codes(speech_lm, TEXTS, settings(3, 1.0, **limits)))


def test_unverified_all_that_is_proposed_is_taken(learnt: SpeechLM) -> None:
    """As many passes as it takes tokens, the end too; of what is known by heart the codes are the same."""
    rows = utterances(4)
    spoken = synthesize_codes(learnt, [row["text"] for row in rows], settings(3, multi_token_verify=False))
    for output, row in zip(spoken, rows, strict=True):
        assert output.n_passes == -(-(output.codes.size + 1) // 3) and output.finish_reason == "stop"
        assert np.array_equal(output.codes, row["audio_codes"][:1])
    speech_lm = with_heads(plain(2), 4, noise=0.5)
    limits = {"min_seconds": 0.2, "seconds_per_character": 0.06}
    for temperature in (0.0, 1.0):
        for output in synthesize_codes(speech_lm, TEXTS, settings(4, temperature, multi_token_verify=False, **limits)):
            assert output.codes.shape[0] == 2 and 0 <= output.codes.min() <= output.codes.max() < CODES
            assert output.n_passes <= -(-(output.codes.size + 1) // 4) + 1


def test_scores_that_are_not_finite_are_told() -> None:
    speech_lm = with_heads(plain(), 3)
    with torch.no_grad():
        speech_lm.model.get_decoder().norm.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        (output,) = synthesize_codes(speech_lm, ["bin blue"], settings(3, temperature))
        assert output.finish_reason == "non_finite" and output.codes.shape == (1, 0)


def test_words_given_one_by_one_are_the_same(tmp_path) -> None:
    """A task by word: each word's codes come of passes of their own, and heads see the end of each."""
    task = get_task("tts-aligned")
    speech_lm = with_heads(plain(), 3, noise=0.1)
    vocabulary = add_marks(speech_lm.text_tokenizer, speech_lm.vocabulary, task.marks)
    extend_with_speech(speech_lm.model, vocabulary, seed=0, first_id=speech_lm.vocabulary.size)
    speech_lm = SpeechLM(speech_lm.model, speech_lm.text_tokenizer, vocabulary)
    texts = ["bin blue at", "now", "lay red"]
    words = [[vocabulary.encode_text(speech_lm.text_tokenizer, word) for word in text.split()] for text in texts]
    asked = [UtteranceTokens(text=np.concatenate(own), words=tuple(own)) for own in words]
    found = {
        n: generate_speech(speech_lm, task, asked, [SpeechLimits(0.6, 0.2)] * 3, settings(n, 0.9), texts)
        for n in (1, 3)
    }
    assert same_outputs(found[1], found[3])
    assert all(output.n_passes >= len(text.split()) for output, text in zip(found[3], texts, strict=True))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_folder_gives_the_same_proposals(tmp_path, kind: str) -> None:
    """Its file of the LLM is a plain one; without the other file it is the same model, with a torn one refused."""
    speech_lm = with_heads(plain(1, kind), 4, noise=0.2)
    folder = save_slm(speech_lm.model, speech_lm.text_tokenizer, speech_lm.vocabulary, tmp_path / "slm")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not any("multi_token" in name for name in file.keys())  # noqa: SIM118 - not a dict
    assert multi_token_heads_of(speech_lm.model) is not None and predicted_tokens(folder) == 4
    loaded, states = SpeechLM.load(folder), torch.randn(5, 32)
    for distance in (2, 3, 4):
        one, other = (multi_token_heads_of(own.model)(distance, states) for own in (speech_lm, loaded))
        assert torch.equal(one, other)
    assert multi_token_heads_of(load_llm(str(folder), random_weights=True)[0]) is None
    content = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).write_bytes(content[:-100])
    with pytest.raises(MultiTokenError, match=FILE_NAME):
        load_llm(str(folder))
    (folder / FILE_NAME).unlink()
    without = SpeechLM.load(folder)
    spoken = [synthesize_codes(one, TEXTS[:2], settings(1, min_seconds=0.4)) for one in (loaded, without)]
    assert same_outputs(*spoken) and predicted_tokens(folder) == 1
    with pytest.raises(MultiTokenError, match="multi_token: 2, and the model has none; set it to 1"):
        synthesize_codes(without, TEXTS[:1], settings(2))


@pytest.mark.parametrize("lora", [[], ["lora.rank=2"]], ids=["full", "lora"])
def test_from_finetune_to_predictions_and_an_export(tmp_path, monkeypatch, lora: list[str]) -> None:
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: StandIn())
    save_llm(tmp_path / "llm")
    corpus = write_corpus(tmp_path / "codes")
    short = ["steps=4", "tokens_per_step=260", "pack_length=64", "save_steps=2", "eval_steps=2", "log_steps=1"]
    own = [f"corpus={corpus}", "device=cpu", "precision=fp32", *lora, *(f"training.{item}" for item in short)]

    def config(name: str, *overrides: str) -> finetune.Config:
        model = [] if any("model=" in item for item in overrides) else [f"model={tmp_path / 'llm'}"]
        return load_config(finetune.Config, None, [f"run_dir={tmp_path / name}", *model, *own, *overrides])

    asked = config("run", "training.multi_token.tokens=3", "training.multi_token.loss_weight=0.5")
    plan = finetune.plan(asked)
    folder = finetune.run(asked)
    model, _, _ = load_llm(str(folder))
    if not lora:
        assert plan["trainable parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert plan["trainable parameters"] - finetune.plan(config("x"))["trainable parameters"] == 2 * 32 * 32
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "eval_loss" in row]
    assert told and all({"eval_tts_token_2_loss", "eval_tts_token_3_loss"} <= row.keys() for row in told)
    assert not any("eval_asr_token" in key for row in told for key in row)
    # A run that was cut off at its end goes on to the same weights.
    content = (folder / FILE_NAME).read_bytes()
    (tmp_path / "run" / "complete.json").unlink()
    shutil.rmtree(folder)
    assert (finetune.run(asked) / FILE_NAME).read_bytes() == content
    if lora:  # the adapter's folder holds all that is needed beside the base
        adapter = tmp_path / "run" / "adapter"
        other, _, _ = load_llm(str(adapter))
        assert predicted_tokens(adapter) == 3
        for a, b in zip(
            multi_token_heads_of(other).parameters(), multi_token_heads_of(model).parameters(), strict=True
        ):
            assert torch.equal(a, b) and a.any()
        return
    # What has heads goes on with them, and without where they are not trained; never with another number.
    again = finetune.run(config("again", f"model={folder}", "training.steps=1", "training.multi_token.tokens=3"))
    assert predicted_tokens(again) == 3
    assert predicted_tokens(finetune.run(config("plain", f"model={folder}", "training.steps=1"))) == 1
    with pytest.raises(MultiTokenError, match="tokens: 4, and the model has heads for 3"):
        finetune.run(config("other", f"model={folder}", "training.multi_token.tokens=4"))
    exported = export.run(export.Config(source=str(tmp_path / "run"), output=str(tmp_path / "out")))
    assert "| of these: multi-token heads |" in (exported / "README.md").read_text()
    limits = ["decoding.min_seconds=1", "decoding.seconds_per_character=0"]
    asked = [f"model={exported}", f"corpus={corpus}", "device=cpu", *limits]
    found = {}
    for n in (1, 3):
        run = tmp_path / f"tts-{n}"
        said = synthesize.run(
            load_config(synthesize.Config, None, [*asked, f"decoding.multi_token={n}", f"run_dir={run}"])
        )
        rows = [json.loads(line) for line in said.read_text().splitlines()]
        found[n] = [(row["n_codes"], row["finish_reason"], (run / row["audio"]).read_bytes()) for row in rows]
        sidecar = json.loads((run / "predictions.json").read_text())
        assert ("tokens_per_pass" in sidecar) == (n > 1)
    assert found[1] == found[3]
    assert 0.5 < sidecar["tokens_per_pass"] <= 3
    with pytest.raises(ConfigError, match="multi_token: 4, and .* predicts 3 a pass; set it to 3"):
        synthesize.plan(load_config(synthesize.Config, None, [*asked, "decoding.multi_token=4", f"run_dir={run}-4"]))


@pytest.mark.parametrize(
    ("options", "pattern", "message"),
    [
        ({"fsdp": "full_shard"}, "semantic", "training.fsdp"),
        ({"deepspeed": "deepspeed-zero2"}, "semantic", "training.deepspeed"),
        ({}, "delay", "pattern=delay"),
    ],
)
def test_what_training_cannot_do_is_refused(options: dict, pattern: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        check_objective(TrainingConfig(**options, multi_token=MultiTokenSettings()), pattern, True)


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (finetune, ["training.multi_token.tokens=1"], "tokens: 1 must be at least 2"),
        (finetune, ["training.multi_token.loss_weight=0"], "loss_weight: 0 must be above 0"),
        (train_lm, ["training.multi_token.tokens=2"], "a text LM has not"),
        (train_preference, ["training.multi_token.tokens=2"], "it is for slm finetune"),
        (train_preference, ["decoding.multi_token=2"], "leave them at 1"),
        (synthesize, ["text=a", "decoding.multi_token=2", "decoding.guidance=2"], "not with guidance"),
        (synthesize, ["text=a", "decoding.multi_token=0"], "multi_token 0 must be"),
        (synthesize, ["text=a", "decoding.multi_token_verify=false"], "nothing is proposed"),
        (synthesize, ["text=a", "decoding.multi_token=2", "stream=true"], "stream: gives a token a pass"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(command, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(command.Config, None, ["run_dir=x", *overrides])


def test_models_and_calls_that_cannot_are_refused() -> None:
    speech_lm = with_heads(plain(), 3)
    one = UtteranceTokens(text=speech_lm.vocabulary.encode_text(speech_lm.text_tokenizer, "bin"))
    with pytest.raises(GenerationError, match="multi_token: a stream"):
        next(stream_speech(speech_lm, get_task("tts"), one, SpeechLimits(1.0), settings(2)))
    with pytest.raises(MultiTokenError, match="4, and the model has heads for 3 tokens; set it to 3"):
        synthesize_codes(speech_lm, ["bin"], settings(4))
    speech_lm.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(MultiTokenError, match="layers with a state"):
        synthesize_codes(speech_lm, ["bin"], settings(3))
