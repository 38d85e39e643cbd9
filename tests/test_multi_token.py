"""Multi-token prediction from training to answers: what heads learn, how they are kept, what they propose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from slm_tiny import CODES, tokens_of, utterances
from test_delay import grown
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from slm.generation import SpeechLM, generate_speech, stream_speech, synthesize_codes
from slm.model.modeling import load_llm, save_slm
from slm.model.multi_token import (
    FILE_NAME,
    MultiTokenError,
    MultiTokenSettings,
    multi_token_heads_of,
    predicted_tokens,
    set_multi_token_heads,
)
from slm.model.speech_rows import extend_with_speech
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import IGNORE
from slm.training.config import TrainingConfig
from slm.training.objectives import finetuning_objective
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
