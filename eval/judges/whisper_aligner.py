"""Whisper as an aligner: where its decoder's cross-attention looks while it is told the text.

The heads that follow the audio are named in the checkpoint's generation config (`alignment_heads`); their weights,
normalised over the tokens and smoothed as OpenAI's word timestamps are (Radford et al. 2022, arXiv 2212.04356; the
`whisper` package), say which frame belongs to which token. The text is given, nothing is recognised.

Shapes: S samples, T encoder frames of 20 ms inside the audio, L tokens, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.judge import spoken_language
from eval.speech.alignment import Alignment, AlignmentError, even_characters, monotonic_spans
from eval.text.normalisers import normalise_basic

__all__ = ["WhisperAligner", "is_whisper"]

_FRAME_S = 0.02
_SHORTEST_S = 0.1


def is_whisper(config: JudgeConfig) -> bool:
    """Whether a recogniser, which is there, is a Whisper."""
    return AutoConfig.from_pretrained(config.name, revision=config.revision).model_type == "whisper"


class WhisperAligner:
    """Aligns as `eval.judges.aligner.Aligner` does; characters share a word's time evenly.

    Args:
        config: Which Whisper, as a judge.
        identity: What :func:`eval.judges.judge.check_judge` says of it.
        device: Where it runs.

    Attributes:
        sampling_rate: Of the audio that it takes, Hz.

    Raises:
        JudgeError: It cannot be loaded, or names no alignment heads.
    """

    def __init__(self, config: JudgeConfig, identity: dict[str, Any], device: str = "cpu") -> None:
        source: dict[str, Any] = {"pretrained_model_name_or_path": config.name, "revision": config.revision}
        eager = {"attn_implementation": "eager", "dtype": torch.float32}  # other kernels do not give their weights
        try:
            model = WhisperForConditionalGeneration.from_pretrained(**source, **eager).eval().to(device)
            self.extractor = AutoFeatureExtractor.from_pretrained(**source)
            self.tokenizer = AutoTokenizer.from_pretrained(**source)
        except Exception as error:  # each library has errors of its own for a torn file
            raise JudgeError(f"aligner {config.name!r} cannot be loaded ({error}): copy or download it anew") from error
        self.model, self.device, self.identity = model, device, identity
        self.heads = getattr(model.generation_config, "alignment_heads", None)
        if not self.heads:
            raise JudgeError(
                f"aligner {config.name!r}: its generation_config.json names no alignment_heads, so it is not known "
                "which attention follows the audio; take one that has them (openai/whisper-base), or "
                "aligner=pocketsphinx"
            )
        language = spoken_language(config)
        if language is not None:
            self.tokenizer.set_prefix_tokens(language="en" if language == "auto" else language, task="transcribe")
        self.sampling_rate: int = self.extractor.sampling_rate
        self.window_s = model.config.max_source_positions * _FRAME_S

    def align(self, audio: np.ndarray, text: str) -> Alignment:
        """Finds each word of a text in its audio (S,) at `sampling_rate`, of at most the encoder's window (30 s).

        Raises:
            AlignmentError: The text is empty or does not fit, the audio is too short or longer than the window.
        """
        words = [word for word in text.split() if normalise_basic(word)]
        if not words:
            raise AlignmentError("the text has no words")
        seconds = len(audio) / self.sampling_rate
        if not _SHORTEST_S <= seconds <= self.window_s:
            raise AlignmentError(
                f"{seconds:.2f} s of audio; Whisper aligns {_SHORTEST_S:g} to {self.window_s:g} s: cut it, or take "
                "another aligner"
            )
        prompt = self.tokenizer.prefix_tokens
        tokens, owners = list(prompt), [-1] * len(prompt)
        for number, word in enumerate(words):
            own = self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            tokens, owners = tokens + own, owners + [number] * len(own)
        tokens, owners = [*tokens, self.tokenizer.eos_token_id], [*owners, len(words)]
        if len(tokens) > self.model.config.max_target_positions:
            most = self.model.config.max_target_positions
            raise AlignmentError(f"the text has {len(tokens)} tokens with the prompt, and this Whisper reads {most}")
        weights = self._weights(audio, tokens)
        # A token's attention predicts the next one. The prompt's last token takes the silence in front of the words,
        # the end token what is behind.
        first = len(prompt) - 1
        spans = monotonic_spans(weights[first - 1 : -1])
        found = []
        for number, word in enumerate(words):
            own = [i for i, owner in enumerate(owners[first:]) if owner == number]
            start, end = (round(float(spans[i][side]) * _FRAME_S, 4) for i, side in ((own[0], 0), (own[-1], 1)))
            found.append({"word": word, "start": start, "end": min(end, round(seconds, 4))})
        letters = [normalise_basic(word).replace(" ", "") for word in words]
        spread = zip(letters, found, strict=True)
        characters = [one for own, word in spread for one in even_characters(own, word["start"], word["end"])]
        return Alignment(found, characters)

    @torch.inference_mode()
    def _weights(self, audio: np.ndarray, tokens: list[int]) -> np.ndarray:
        """How much each token (L) looks at each frame (T), averaged over the alignment heads."""
        length = round(self.window_s * self.sampling_rate)
        features = self.extractor(
            [audio], sampling_rate=self.sampling_rate, return_tensors="pt", padding="max_length", max_length=length
        )["input_features"].to(self.device)
        inputs = torch.tensor([tokens], device=self.device)
        found = self.model(input_features=features, decoder_input_ids=inputs, output_attentions=True).cross_attentions
        frames = math.ceil(len(audio) / self.sampling_rate / _FRAME_S)
        heads = torch.stack([found[layer][0, head, :, :frames] for layer, head in self.heads])  # (H, L, T)
        if heads.shape[1] > heads.shape[2]:
            raise AlignmentError(f"the text is longer than the audio: {heads.shape[1]} tokens, {frames} frames")
        deviation, mean = torch.std_mean(heads, dim=1, keepdim=True, correction=0)
        smooth = _median(((heads - mean) / deviation.clamp_min(1e-8)), self.model.config.median_filter_width)
        return smooth.mean(dim=0).double().cpu().numpy()


def _median(values: torch.Tensor, width: int) -> torch.Tensor:
    """The running median of (H, L, T) over time, its ends mirrored."""
    half = width // 2
    if values.shape[-1] <= half:
        return values
    padded = torch.nn.functional.pad(values, (half, half), mode="reflect")
    return padded.unfold(-1, width, 1).median(dim=-1).values
