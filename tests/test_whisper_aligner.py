"""Whisper as an aligner: the attention that follows the audio becomes times; and aligners against GRID's own times."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from eval.judges import whisper_aligner
from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.sphinx_aligner import SphinxAligner
from eval.judges.whisper_aligner import WhisperAligner
from eval.speech.alignment import AlignmentError, monotonic_spans

GRID = Path(__file__).resolve().parents[2] / "shared" / "data" / "grid-s1"
FRAMES, HEADS, LAYERS, RATE = 100, 3, 2, 16_000
PROMPT, END = [1, 2], 3


def test_spans_are_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(5):
        weights = rng.normal(size=(3, 6))
        spans = monotonic_spans(weights)
        assert spans[0, 0] == 0 and spans[-1, 1] == 6 and (spans[1:, 0] == spans[:-1, 1]).all()
        best = max(
            sum(weights[i, a:b].sum() for i, (a, b) in enumerate(itertools.pairwise((0, *cuts, 6))))
            for cuts in itertools.combinations(range(1, 6), 2)
        )
        assert sum(weights[i, a:b].sum() for i, (a, b) in enumerate(spans)) == pytest.approx(best)


class Text:
    """A tokenizer of one token a letter."""

    prefix_tokens, eos_token_id = PROMPT, END

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [10 + ord(letter) - ord("a") for letter in text.strip()]}


def looking(tokens: list[int], spans: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Cross-attention in which head (1, 2) looks, a token early, where `spans` are; all others at the first frames."""
    found = [torch.full((1, HEADS, len(tokens), FRAMES), 0.001) for _ in range(LAYERS)]
    for layer in found:
        layer[:, :, :, :3] = 0.9
    found[1][0, 2] = 0.001
    for row, (first, last) in enumerate(spans, start=len(PROMPT) - 2):
        found[1][0, 2, row, first:last] = 0.9
    return found


@pytest.fixture
def aligner(monkeypatch):
    """An aligner whose model says of the text "ab c" that a, b and c stand at 30, 40 and 60 to 80 of 100 frames."""
    asked = []

    def model(input_features, decoder_input_ids, output_attentions):
        asked.append(decoder_input_ids[0].tolist())
        spans = [(0, 30), (30, 40), (40, 60), (60, 80), (80, 100)]  # of the prompt's last token first, of the end last
        return SimpleNamespace(cross_attentions=looking(asked[-1], spans))

    model.eval = lambda: model
    model.to = lambda device: model
    model.generation_config = SimpleNamespace(alignment_heads=[[1, 2]])
    model.config = SimpleNamespace(max_source_positions=FRAMES, max_target_positions=20, median_filter_width=7)

    def extractor(clips, **kwargs):
        return {"input_features": torch.zeros(1, 8, 2 * FRAMES)}

    extractor.sampling_rate = RATE
    for name, part in (
        ("WhisperForConditionalGeneration", model), ("AutoFeatureExtractor", extractor), ("AutoTokenizer", Text()),
    ):  # fmt: skip
        monkeypatch.setattr(whisper_aligner, name, SimpleNamespace(from_pretrained=lambda part=part, **kwargs: part))
    monkeypatch.setattr(whisper_aligner, "spoken_language", lambda config: None)
    made = WhisperAligner(JudgeConfig(name="whisper"), {})
    made.asked = asked
    return made


def test_known_times_are_found(aligner):
    found = aligner.align(np.zeros(2 * RATE, dtype=np.float32), "ab - c")
    assert aligner.asked == [[*PROMPT, 10, 11, 12, END]]
    times = [(word["start"], word["end"]) for word in found.words]
    assert np.allclose(times, [(0.6, 1.2), (1.2, 1.6)], atol=0.021)
    assert [entry["character"] for entry in found.characters] == ["a", "b", "c"]
    assert found.characters[0]["end"] == found.characters[1]["start"] == pytest.approx(0.9, abs=0.021)


def test_what_cannot_be_aligned_says_why(aligner, monkeypatch):
    second = np.zeros(RATE, dtype=np.float32)
    for audio, text, why in (
        (second, "?!", "the text has no words"),
        (second[:100], "a", "0.01 s of audio"),
        (np.zeros(3 * RATE, dtype=np.float32), "a", "3.00 s of audio; Whisper aligns 0.1 to 2 s"),
        (second, "abcdefgh" * 3, "27 tokens with the prompt, and this Whisper reads 20"),
        (second[:1700], "abcdef", "longer than the audio"),
    ):
        with pytest.raises(AlignmentError, match=why):
            aligner.align(audio, text)
    aligner.model.generation_config.alignment_heads = None
    with pytest.raises(JudgeError, match=r"names no alignment_heads.*aligner=pocketsphinx"):
        WhisperAligner(JudgeConfig(name="whisper"), {})


def grid_words(limit: int):
    """Recordings of GRID with its own word boundaries, (6, 2) in seconds."""
    if not GRID.is_dir():
        pytest.skip(f"{GRID} is not there")
    own = json.loads((Path(__file__).parent / "grid_words.json").read_text(encoding="utf-8"))
    lines = (GRID / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    for name, edges in list(own["boundaries"].items())[:limit]:
        audio, rate = soundfile.read(GRID / rows[name]["audio"], dtype="float32")
        seconds = np.array(edges) / own["unit_hz"]
        assert rate == RATE and len(edges) == 1 + len(rows[name]["text"].split())
        yield audio, rows[name]["text"], np.stack([seconds[:-1], seconds[1:]], axis=1)


def test_pocketsphinx_agrees_with_grid_s_own_alignments():
    pytest.importorskip("pocketsphinx", reason="extra `eval` is not installed")
    sphinx, errors = SphinxAligner(), []
    for audio, text, wanted in grid_words(24):
        words = sphinx.align(audio, text).words
        assert [word["word"] for word in words] == text.split()
        errors.append(np.array([(word["start"], word["end"]) for word in words]) - wanted)
    off = np.abs(np.concatenate(errors))
    assert len(off) == 144 and (np.median(off, axis=0) < 0.03).all() and ((off < 0.1).mean(axis=0) > 0.9).all()
