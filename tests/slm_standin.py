"""A tiny speech LM, and a codec whose codes say nothing: what tests of transcribe and synthesize run on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from slm_tiny import CODES, FINGERPRINT, save_llm, tokens_of, utterances

from slm.generation import SpeechLM
from slm.model.modeling import load_llm, save_slm
from slm.model.speech_rows import extend_with_speech
from slm.training.config import TrainingConfig
from slm.training.samples import SpeechSamples
from slm.training.train import train
from slm.vocabulary import add_speech


def make_slm(folder, n_codebooks: int = 1, chat: bool = False, **facts) -> SpeechLM:
    """A speech LM with random weights, saved into a folder and loaded from it."""
    model, tokenizer, _ = load_llm(str(save_llm(folder / "llm", chat=chat)))
    facts = {"fingerprint": FINGERPRINT, "frame_rate": 12.5, "tokenizer": "tiny", "normaliser": "basic"} | facts
    vocabulary = add_speech(tokenizer, [CODES, CODES], n_codebooks=n_codebooks, **facts)
    extend_with_speech(model, vocabulary, seed=0)
    save_slm(model, tokenizer, vocabulary, folder / "slm")
    return SpeechLM.load(folder / "slm")


def learnt_by_heart(folder) -> SpeechLM:
    """Has learnt four sentences and their codes."""
    speech_lm = make_slm(folder, chat=True)
    vocabulary = speech_lm.vocabulary
    tokens = tokens_of(vocabulary, speech_lm.text_tokenizer, utterances(4))
    samples = SpeechSamples(vocabulary, tokens, {"asr": 1.0, "tts": 1.0})
    config = TrainingConfig(steps=120, tokens_per_step=400, learning_rate=1e-2, warmup_steps=10, eval_steps=0)
    train(speech_lm.model, samples, None, config, folder / "checkpoints", seed=1)
    speech_lm.model.eval()
    return speech_lm


class StandIn:
    """The codec protocol with codes that say nothing."""

    decode_paths = ("reconstruction", "semantic_reconstruction")

    def __init__(self) -> None:
        self.config = SimpleNamespace(sampling_rate=16000, frame_rate=12.5, codebook_sizes=[CODES, CODES])

    def fingerprint(self, precision: str = "fp32", sound: bool = False) -> str:
        return FINGERPRINT if precision == "fp32" else "0"

    def encode(self, input_values, padding_mask):
        frames = -(-input_values.shape[-1] // 1280)
        codes = torch.arange(frames).remainder(CODES).expand(len(input_values), 2, frames)
        return SimpleNamespace(audio_codes=codes, audio_codes_mask=torch.ones(len(input_values), frames, dtype=bool))

    def decode(self, audio_codes, lengths=None):
        assert audio_codes.shape[1] == 1  # book 0 alone: semantic reconstruction
        values = torch.sin(torch.arange(audio_codes.shape[-1] * 1280) * 0.05)
        return SimpleNamespace(audio_values=0.3 * values.expand(len(audio_codes), 1, -1))


def lines(path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
