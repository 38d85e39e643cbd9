"""The head for legal ids alone: its logits there are the whole head's, and the answers are the same."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from slm_tiny import CODES, tiny_model, tiny_tokenizer
from torch import nn

from slm.decoding import running_batch
from slm.decoding.legal_head import legal_rows
from slm.generation import SpeechLM, synthesize_codes, transcribe_codes
from slm.model.speech_rows import extend_with_speech
from slm.settings import SynthesizeSettings
from slm.vocabulary import add_speech

TEXTS = ["bin blue at f two now", "lay red", "set white in z four soon"]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
def test_the_logits_of_legal_ids_are_those_of_the_whole_head(kind: str) -> None:
    model = tiny_model(kind, 60)
    ids = torch.arange(1, 13)[None]
    legal = torch.zeros(2, 60, dtype=torch.bool)
    legal[0, 5:9], legal[1, 20:25] = True, True
    with torch.inference_mode():
        whole = model(ids).logits
        with legal_rows(model, list(legal), end_id=50):
            some = model(ids).logits
        after = model(ids).logits
    columns = [*range(5, 9), *range(20, 25), 50]
    torch.testing.assert_close(some[..., columns], whole[..., columns])
    assert not np.delete(some.numpy(), columns, axis=-1).any()
    assert torch.equal(after, whole) and "forward" not in model.get_output_embeddings().__dict__


def test_a_head_with_a_bias_and_one_that_is_mostly_legal() -> None:
    model = tiny_model("llama", 60)
    model.set_output_embeddings(nn.Linear(32, 60))
    ids, legal = torch.arange(1, 13)[None], torch.zeros(60, dtype=torch.bool)
    legal[:10] = True
    with torch.inference_mode():
        whole = model(ids).logits
        with legal_rows(model, [legal], end_id=50):
            torch.testing.assert_close(model(ids).logits[..., :10], whole[..., :10])
        with legal_rows(model, [~legal], end_id=50):
            assert torch.equal(model(ids).logits, whole)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_answers_are_those_of_the_whole_head(monkeypatch, guidance: float) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen2", len(tokenizer))
    vocabulary = add_speech(tokenizer, [CODES] * 2, n_codebooks=2)
    extend_with_speech(model, vocabulary, seed=0)
    speech_lm = SpeechLM(model, tokenizer, vocabulary)
    settings = SynthesizeSettings(temperature=1.0, top_k=9, min_seconds=0.5, guidance=guidance)
    codes = [np.random.default_rng(n).integers(0, CODES, (2, n)) for n in (3, 7)]

    def answers() -> list:
        spoken = [(one.codes.tolist(), one.finish_reason) for one in synthesize_codes(speech_lm, TEXTS, settings)]
        return [*spoken, *(one.text for one in transcribe_codes(speech_lm, codes))]

    some = answers()
    monkeypatch.setattr(running_batch, "legal_rows", lambda *_: nullcontext())
    assert answers() == some
