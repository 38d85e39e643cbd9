"""`delay` and `parallel` from training to answers: books beside the ids are read, learnt, said, saved, resumed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from slm_tiny import CODES, FINGERPRINT, save_llm, tiny_model, tiny_tokenizer, tokens_of, utterances, write_corpus
from test_slm_training import KillAt, losses, same_weights
from torch.nn import functional as F

from recipes.commands import export, finetune, synthesize, train_preference, transcribe
from recipes.config import ConfigError, load_config
from recipes.inference import setup
from slm.generation import SpeechLM, generate_speech, stream_speech, synthesize_codes, transcribe_codes
from slm.model.further_books import FILE_NAME, FurtherBooksError, further_books_of, read_beside
from slm.model.lora import LoraSettings, add_lora
from slm.model.modeling import load_llm, save_slm
from slm.model.speech_rows import extend_with_speech
from slm.patterns import EMPTY
from slm.settings import SpeechLimits, SynthesizeSettings, TranscribeSettings
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import IGNORE, make_example
from slm.training import delay
from slm.training.batches import ONE_ROW, pack
from slm.training.config import TrainingConfig, TrainingError
from slm.training.delay import check_delay, delay_objective
from slm.training.samples import NoiseConfig, SpeechSamples
from slm.training.train import train
from slm.vocabulary import SpeechVocabulary, add_speech

OPTIONS = {"tokens_per_step": 260, "pack_length": 64, "learning_rate": 3e-3, "warmup_steps": 2, "log_steps": 1}
GREEDY = SynthesizeSettings(temperature=0.0)


def grown(n: int = 3, kind: str = "qwen2", pattern: str = "delay") -> SpeechLM:
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, len(tokenizer) + 5)
    model.config.attention_dropout = 0.0
    facts = {"fingerprint": FINGERPRINT, "tokenizer": "tiny", "normaliser": "basic"}
    vocabulary = add_speech(tokenizer, [CODES] * 4, n_codebooks=n, pattern=pattern, **facts)
    extend_with_speech(model, vocabulary, seed=0)
    return SpeechLM(model, tokenizer, vocabulary)


def samples_of(speech_lm: SpeechLM, n: int = 12, noise: float = 0.1) -> SpeechSamples:
    vocabulary = speech_lm.vocabulary
    tokens = tokens_of(vocabulary, speech_lm.text_tokenizer, utterances(n, books=vocabulary.n_codebooks))
    return SpeechSamples(vocabulary, tokens, {"asr": 1.0, "tts": 1.0}, NoiseConfig(noise, noise))


def fit(folder: Path, speech_lm: SpeechLM, model=None, callbacks=(), weight: float = 1.0, **options):
    samples = samples_of(speech_lm)
    config = TrainingConfig(**(OPTIONS | {"steps": 6, "eval_steps": 0, "save_steps": 2} | options))
    return train(
        speech_lm.model if model is None else model,
        samples,
        samples if config.eval_steps else None,
        config,
        folder,
        seed=7,
        callbacks=callbacks,
        objective=delay_objective(speech_lm.vocabulary, weight),
    )


@pytest.fixture(scope="module", params=["delay", "parallel"])
def learnt(request, tmp_path_factory) -> SpeechLM:
    """Has learnt four sentences and their two books of codes by heart."""
    speech_lm = grown(2, pattern=request.param)
    samples = samples_of(speech_lm, n=4, noise=0.0)
    config = TrainingConfig(steps=120, tokens_per_step=400, learning_rate=1e-2, warmup_steps=10, eval_steps=0)
    folder = tmp_path_factory.mktemp("checkpoints")
    train(speech_lm.model, samples, None, config, folder, seed=1, objective=delay_objective(speech_lm.vocabulary, 1.0))
    speech_lm.model.eval()
    return speech_lm


def plain_losses(speech_lm: SpeechLM, example) -> torch.Tensor:
    """(n,) sums of cross-entropies of an example's books, written out without hooks: of `inputs_embeds` and states."""
    model, books = speech_lm.model, further_books_of(speech_lm.model)
    embedded = model.get_input_embeddings()(torch.from_numpy(example.input_ids)[None])
    for position, codes in enumerate(example.further):
        for book, code in enumerate(codes):
            if code != EMPTY:
                embedded[0, position] += books.embeddings[book].weight[code]
    states = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    found = []
    for book, labels in enumerate([example.labels, *example.further_labels.T]):
        head = model.get_output_embeddings() if book == 0 else books.heads[book - 1]
        target = torch.from_numpy(labels)[1:]
        found.append(F.cross_entropy(head(states[:-1]), target, reduction="sum", ignore_index=IGNORE))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("kind", "pattern"), [("qwen2", "delay"), ("llama", "delay"), ("gemma", "delay"), ("qwen2", "parallel")]
)
def test_the_loss_is_that_of_all_books_packed_padded_or_alone(tmp_path, kind: str, pattern: str) -> None:
    """Against the sums written out, sequence by sequence, with loss weights; and each book's figure."""
    speech_lm = grown(3, kind, pattern)
    model, vocabulary = speech_lm.model.eval(), speech_lm.vocabulary
    weights = [1.0, 0.5, 2.0]
    tokens = tokens_of(vocabulary, speech_lm.text_tokenizer, utterances(3, books=3))
    asked = zip(("tts", "asr", "tts"), tokens, strict=True)
    examples = [make_example(vocabulary, get_task(task), one) for task, one in asked]
    with torch.no_grad():
        each = torch.stack([plain_losses(speech_lm, example) for example in examples])
    assert (each[1, 1:] == 0).all() and (each[0] > 0).all()
    wanted = sum(w * (own[0] + 0.3 * own[1:].mean()) for w, own in zip(weights, each, strict=True))
    trainer = fit(tmp_path, speech_lm, copy.deepcopy(model), steps=1, weight=0.3)
    trainer.model.load_state_dict(model.state_dict())
    trainer.model.eval()
    for pack_length in (0, 64, ONE_ROW):
        batch = pack(examples, weights, pack_length)
        with torch.no_grad():
            total, _ = trainer._weighted_sum(trainer.model, batch)
        torch.testing.assert_close(total, wanted, atol=1e-3, rtol=1e-4)
        found = trainer._further_figures(trainer._beside)
        n_said = sum(w * (example.labels != IGNORE).sum() for w, example in zip(weights, examples, strict=True))
        assert found["book_0_loss"] == pytest.approx(float((torch.tensor(weights) @ each)[0] / n_said), rel=1e-4)
        n_codes = sum(w * tokens[i].codes.shape[1] for i, w in ((0, 1.0), (2, 2.0)))
        for book in (1, 2):
            expected = float((torch.tensor(weights) @ each)[book] / n_codes)
            assert found[f"book_{book}_loss"] == pytest.approx(expected, rel=1e-4)


def test_of_very_many_books_one_mean_is_told(tmp_path, monkeypatch) -> None:
    speech_lm = grown(3)
    trainer = fit(tmp_path, speech_lm, steps=1)
    sums = torch.tensor([[6.0, 8.0, 9.0], [3.0, 2.0, 2.0]])
    monkeypatch.setattr(delay, "MOST_BOOKS_TOLD", 1)
    assert trainer._further_figures(sums) == {"book_0_loss": 2.0, "further_books_loss": 4.25}


def test_every_book_s_table_and_head_learn_and_accumulation_changes_nothing(tmp_path) -> None:
    speech_lm = grown(3)
    before = copy.deepcopy(further_books_of(speech_lm.model).state_dict())
    start = copy.deepcopy(speech_lm.model)
    one = fit(tmp_path / "1", speech_lm)
    after = further_books_of(one.model).state_dict()
    for name, value in before.items():
        assert (after[name] != value).any(dim=1).all(), name
    many = fit(tmp_path / "3", speech_lm, start, gradient_accumulation=3, gradient_checkpointing=True)
    assert losses(one)[0] > losses(one)[-1]
    assert losses(one) == pytest.approx(losses(many), abs=1e-4)
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path, lora: bool) -> None:
    def fresh() -> tuple[SpeechLM, torch.nn.Module]:
        speech_lm = grown(3)
        model = speech_lm.model
        if lora:
            torch.manual_seed(3)
            model = add_lora(model, speech_lm.vocabulary, LoraSettings(rank=2))
        return speech_lm, model

    whole = fit(tmp_path / "whole", *fresh(), gradient_accumulation=2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", *fresh(), callbacks=[KillAt(5)], gradient_accumulation=2)
    resumed = fit(tmp_path / "killed", *fresh(), gradient_accumulation=2)
    assert same_weights(whole, resumed)
    assert losses(whole)[4:] == losses(resumed)[-2:]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_under_lora_adapters_new_rows_and_further_books_move_and_nothing_else(tmp_path, kind: str) -> None:
    speech_lm = grown(2, kind)
    own = further_books_of(speech_lm.model)
    model = add_lora(speech_lm.model, speech_lm.vocabulary, LoraSettings(rank=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = fit(tmp_path, speech_lm, model)
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    kinds = ("lora_A", "lora_B", "trainable_tokens_delta", "further_books.modules_to_save")
    assert all(any(kind in name for kind in kinds) for name in moved), moved
    assert all(any(kind in name for name in moved) for kind in kinds)
    assert not any("lora" in name for name in before if "further_books" in name)
    trained = further_books_of(trainer.model.get_base_model())
    assert trained is not own and not torch.equal(trained.heads[0].weight, own.heads[0].weight)


def test_what_was_learnt_comes_back(learnt: SpeechLM) -> None:
    """Both books of the codes, code for code, and the texts of both: greedily and by a beam."""
    rows = utterances(4)
    spoken = synthesize_codes(learnt, [row["text"] for row in rows], GREEDY)
    for output, row in zip(spoken, rows, strict=True):
        assert output.finish_reason == "stop" and np.array_equal(output.codes, row["audio_codes"])
    for settings in (TranscribeSettings(), TranscribeSettings(num_beams=3, n_best=2)):
        heard = transcribe_codes(learnt, [row["audio_codes"] for row in rows], settings)
        assert [output.text for output in heard] == [row["text"] for row in rows]


def test_a_transcript_depends_on_the_further_books() -> None:
    speech_lm = grown(3)
    codes = np.random.default_rng(0).integers(0, CODES, (3, 9))
    other = codes.copy()
    other[2, 0] = (other[2, 0] + 1) % CODES

    def logits(codes: np.ndarray) -> torch.Tensor:
        example = make_example(speech_lm.vocabulary, get_task("asr"), UtteranceTokens(codes, np.array([5, 6])))
        with torch.no_grad(), read_beside(speech_lm.model, lambda *_: torch.from_numpy(example.further)[None]):
            return speech_lm.model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0]

    difference = (logits(codes) - logits(other)).abs().amax(dim=1)
    changed = int(difference.ne(0).float().argmax())
    # before, speech, and two frames late
    assert changed == len(speech_lm.vocabulary.before) + 1 + 2 and (difference[changed:] > 0).all()


TEXTS = ["bin blue at f two now", "lay red by a nine please", "a", "set white in z four soon", "place green"]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("n", "pattern"), [(2, "delay"), (4, "delay"), (3, "parallel")])
def test_a_batch_draws_what_its_texts_draw_alone(n: int, pattern: str, guidance: float) -> None:
    """Rows that end at different steps, by themselves, by their budget and in a loop; all their codes are whole."""
    speech_lm = grown(n, pattern=pattern)
    settings = SynthesizeSettings(
        temperature=1.5, top_k=9, top_p=0.95, min_seconds=0.2, seconds_per_character=0.04, guidance=guidance, loop_s=1.0
    )
    many = synthesize_codes(speech_lm, TEXTS, settings)
    for text, output in zip(TEXTS, many, strict=True):
        (alone,) = synthesize_codes(speech_lm, [text], settings)
        assert np.array_equal(output.codes, alone.codes) and output.finish_reason == alone.finish_reason
        assert output.codes.shape[0] == n and output.codes.min() >= 0 and output.codes.max() < CODES
    assert len({output.codes.shape[1] for output in many}) > 1
    assert {output.finish_reason for output in many} > {"stop"} or guidance > 1


@pytest.mark.parametrize(("n", "pattern"), [(2, "delay"), (3, "delay"), (4, "delay"), (4, "parallel")])
def test_a_stream_gives_the_same_codes(n: int, pattern: str) -> None:
    speech_lm = grown(n, pattern=pattern)
    settings = SynthesizeSettings(temperature=1.0)
    task = get_task("tts")
    for text, most in zip(TEXTS, (0.9, 0.08, 2.0, 0.5, 0.16), strict=True):
        one = UtteranceTokens(text=speech_lm.vocabulary.encode_text(speech_lm.text_tokenizer, text))
        limits = SpeechLimits(most)
        (whole,) = generate_speech(speech_lm, task, [one], [limits], settings, [text])
        parts = list(stream_speech(speech_lm, task, one, limits, settings, text, chunk_s=0.16))
        assert np.array_equal(np.concatenate([part.codes for part in parts], axis=1), whole.codes)
        assert parts[-1].finish_reason == whole.finish_reason
        assert 1 <= whole.codes.shape[1] <= max(1, np.ceil(most * 12.5))


@pytest.mark.parametrize("n", [2, 4])
def test_a_frame_is_a_step_of_the_llm(n: int) -> None:
    """Where `flatten` takes as many as there are books."""
    steps = {}
    for pattern in ("flatten", "delay", "parallel"):
        speech_lm, calls = grown(n, pattern=pattern), []
        speech_lm.model.get_decoder().register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        vocabulary = speech_lm.vocabulary
        one = UtteranceTokens(text=vocabulary.encode_text(speech_lm.text_tokenizer, "bin blue"))
        (output,) = generate_speech(speech_lm, get_task("tts"), [one], [SpeechLimits(0.8, 0.8)], GREEDY)
        steps[pattern], frames = len(calls), output.codes.shape[1]
        assert frames == 10
    assert steps == {"flatten": 10 * n + 1, "delay": 10 + max(1, n - 1), "parallel": 10 + 1}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_folder_gives_the_same_logits_of_every_book(tmp_path, kind: str) -> None:
    """Its file of the LLM is a plain one; without the other file, or with a torn one, it is refused by name."""
    speech_lm = grown(3, kind)
    folder = save_slm(speech_lm.model, speech_lm.text_tokenizer, speech_lm.vocabulary, tmp_path / "slm")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert not any("further" in name for name in file.keys())  # noqa: SIM118 - not a dict
    assert further_books_of(speech_lm.model) is not None
    loaded = SpeechLM.load(folder)
    assert loaded.vocabulary == speech_lm.vocabulary
    example = make_example(loaded.vocabulary, get_task("asr"), UtteranceTokens(np.ones((3, 5), int), np.array([5])))

    def logits(one: SpeechLM) -> list[torch.Tensor]:
        with torch.no_grad(), read_beside(one.model, lambda *_: torch.from_numpy(example.further)[None]) as states:
            own = one.model(input_ids=torch.from_numpy(example.input_ids)[None]).logits
            return [own, *further_books_of(one.model).logits(states[0])]

    for a, b in zip(logits(speech_lm), logits(loaded), strict=True):
        assert torch.equal(a, b)
    content = (folder / FILE_NAME).read_bytes()
    (folder / FILE_NAME).write_bytes(content[:-100])
    with pytest.raises(FurtherBooksError, match=FILE_NAME):
        load_llm(str(folder))
    (folder / FILE_NAME).unlink()
    with pytest.raises(FurtherBooksError, match=f"no {FILE_NAME}"):
        load_llm(str(folder))


class StandIn:
    """The codec protocol; it hears how many books it is given."""

    decode_paths = ("reconstruction", "semantic_reconstruction")
    heard: list[int] = []

    def __init__(self) -> None:
        self.config = SimpleNamespace(sampling_rate=16000, frame_rate=12.5, codebook_sizes=[CODES, CODES])

    def fingerprint(self, precision: str = "fp32", sound: bool = False) -> str:
        return FINGERPRINT

    def decode(self, audio_codes, lengths=None):
        self.heard.append(audio_codes.shape[1])
        values = torch.sin(torch.arange(audio_codes.shape[-1] * 1280) * 0.05)
        return SimpleNamespace(audio_values=0.3 * values.expand(len(audio_codes), 1, -1))


@pytest.mark.parametrize("lora", [[], ["lora.rank=2"]], ids=["full", "lora"])
def test_from_finetune_to_predictions_and_an_export(tmp_path, monkeypatch, lora: list[str]) -> None:
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: StandIn())
    save_llm(tmp_path / "llm")
    corpus = write_corpus(tmp_path / "codes")
    short = ["steps=4", "tokens_per_step=260", "pack_length=64", "save_steps=2", "eval_steps=2", "log_steps=1"]
    own = [f"model={tmp_path / 'llm'}", f"corpus={corpus}", "device=cpu", "precision=fp32", *lora]
    own += ["n_codebooks=2", "pattern=delay", "eval_transcripts=1", *(f"training.{item}" for item in short)]

    def config(name: str, *overrides: str) -> finetune.Config:
        return load_config(finetune.Config, None, [f"run_dir={tmp_path / name}", *own, *overrides])

    plan = finetune.plan(config("run"))
    folder = finetune.run(config("run"))
    model, _, vocabulary = load_llm(str(folder))
    if not lora:
        assert plan["trainable parameters"] == sum(p.numel() for p in model.parameters())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [row for row in rows if "eval_loss" in row]
    assert told and all({"eval_tts_book_0_loss", "eval_tts_book_1_loss", "eval_asr_wer"} <= row.keys() for row in told)
    assert not any("eval_asr_book" in key for row in told for key in row)
    # A run that was cut off at its end goes on to the same weights.
    content = (folder / FILE_NAME).read_bytes()
    (tmp_path / "run" / "complete.json").unlink()
    shutil.rmtree(folder)
    assert (finetune.run(config("run")) / FILE_NAME).read_bytes() == content
    if lora:  # the adapter's folder holds all that is needed beside the base
        other, _, same = load_llm(str(tmp_path / "run" / "adapter"))
        assert same == vocabulary
        for a, b in zip(further_books_of(other).parameters(), further_books_of(model).parameters(), strict=True):
            assert torch.equal(a, b)
        return
    # What speaks already goes on with its own books, and by no other pattern.
    again = finetune.run(config("again", f"model={folder}", "training.steps=1"))
    assert SpeechVocabulary.load(again).further_sizes == (CODES,)
    with pytest.raises(ConfigError, match="made with delay, not flatten"):
        finetune.run(config("other", f"model={folder}", "pattern=flatten"))
    exported = export.run(export.Config(source=str(tmp_path / "run"), output=str(tmp_path / "out"), dtype="bf16"))
    assert "| of these: further books |" in (exported / "README.md").read_text()
    assert torch.equal(
        further_books_of(load_llm(str(exported))[0]).heads[0].weight,
        further_books_of(model).heads[0].weight.bfloat16().float(),
    )
    asked = [f"model={exported}", f"corpus={corpus}", "device=cpu"]
    transcribe.run(load_config(transcribe.Config, None, [*asked, f"run_dir={tmp_path / 'asr'}"]))
    limits = ["decoding.min_seconds=1", "decoding.seconds_per_character=0"]
    said = synthesize.run(load_config(synthesize.Config, None, [*asked, *limits, f"run_dir={tmp_path / 'tts'}"]))
    assert StandIn.heard and set(StandIn.heard) == {2}
    for row in map(json.loads, said.read_text().splitlines()):
        audio, _ = soundfile.read(tmp_path / "tts" / row["audio"])
        assert 2 * len(audio) == row["n_codes"] * 1280
    for name in ("asr", "tts"):
        sidecar = json.loads((tmp_path / name / "predictions.json").read_text())
        assert (sidecar["pattern"], sidecar["n_codebooks"], sidecar["positions_per_s"]) == ("delay", 2, 12.5)
    with pytest.raises(ConfigError, match=r"(?s)pattern is delay.*no preference"):
        train_preference.run(
            load_config(train_preference.Config, None, [f"model={folder}", f"run_dir={tmp_path / 'p'}"])
        )


@pytest.mark.parametrize("settings", [{"fsdp": "full_shard"}, {"deepspeed": "deepspeed-zero2"}])
@pytest.mark.parametrize("pattern", ["delay", "parallel"])
def test_engines_that_shard_are_refused(settings, pattern: str) -> None:
    with pytest.raises(TrainingError, match=f"training.{next(iter(settings))}.*{pattern}.*torchrun alone"):
        check_delay(pattern, TrainingConfig(**settings))
    check_delay("flatten", TrainingConfig(**settings))


def test_scores_that_are_not_finite_are_told() -> None:
    speech_lm = grown(3)
    with torch.no_grad():
        speech_lm.model.get_decoder().norm.weight.fill_(float("nan"))
    for settings in (GREEDY, SynthesizeSettings(temperature=1.0)):
        (output,) = synthesize_codes(speech_lm, ["bin blue"], settings)
        assert output.finish_reason == "non_finite" and output.codes.shape == (3, 0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_further_books_have_the_tables_learning_rate(tmp_path, lora: bool) -> None:
    """They are new as the new rows are; in the group are those that train."""
    speech_lm = grown(2)
    model = add_lora(speech_lm.model, speech_lm.vocabulary, LoraSettings(rank=2)) if lora else speech_lm.model
    trainer = fit(tmp_path, speech_lm, model, steps=1, embedding_learning_rate=1e-2, schedule="constant")
    own = {id(p) for p in further_books_of(speech_lm.model).parameters()}
    groups = trainer.optimizer.param_groups
    rates = {group["initial_lr"] for group in groups if own & {id(p) for p in group["params"]}}
    assert rates == {1e-2} and own <= {id(p) for group in groups for p in group["params"]}
    assert {group["initial_lr"] for group in groups} == {1e-2, 3e-3}
