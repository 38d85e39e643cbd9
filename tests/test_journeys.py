"""A contributor's journeys: what can be added to the project from a file outside it, without editing a list inside."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from typer.testing import CliRunner

from eval.report.markdown import results_markdown
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.results_file import load_results, save_results
from eval.schema import Results
from eval.speech.measures import registry
from eval.speech.measures.registry import Measure, register_measure
from eval.speech.quality import QualitySummary, compare_audio, summarise_quality
from recipes import cli
from recipes.commands import encode, resynthesize
from recipes.config import from_values
from slm.corpus import CodedCorpus
from tokenizer import load_tokenizer
from tokenizer.codecs.base import Codec
from tokenizer.loading import CODECS, register_codec
from tokenizer.protocol import CodecConfig

RATE_HZ, HOP = 16_000, 320


class LevelConfig(PreTrainedConfig):
    """Sizes of the toy codec."""

    model_type = "toy_levels"
    levels: int = 16


class LevelModel(PreTrainedModel):
    """Two books: how loud a frame is in steps of 6 dB, and how often it crosses zero."""

    config_class = LevelConfig
    main_input_name = "input_values"

    def __init__(self, config: LevelConfig) -> None:
        super().__init__(config)
        self.gains = nn.Parameter(2.0 ** -torch.arange(config.levels))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is random."""


class LevelCodec(Codec):
    """The toy codec behind the codec protocol."""

    def __init__(self, model: LevelModel, num_codebooks: int | None = None) -> None:
        config = CodecConfig(model.config.model_type, RATE_HZ, HOP, [model.config.levels] * 2)
        super().__init__(model, config, num_codebooks)

    def encode_frames(self, samples: Tensor) -> Tensor:
        frames = samples[:, 0].unflatten(1, (-1, HOP))
        loudness = (frames.abs().amax(-1, keepdim=True) - self.model.gains).abs().argmin(-1)
        crossings = (frames[..., 1:].sign() != frames[..., :-1].sign()).sum(-1)
        return torch.stack([loudness, crossings.clamp(max=self.model.config.levels - 1)], dim=1)

    def decode_frames(self, codes: Tensor) -> Tensor:
        return self.model.gains[codes[:, 0]].repeat_interleave(HOP, dim=-1)


@pytest.fixture
def level_codec(tmp_path: Path) -> Iterator[Path]:
    """The folder of a toy codec that is registered with transformers and with `load_tokenizer`."""
    AutoConfig.register(LevelConfig.model_type, LevelConfig, exist_ok=True)
    AutoModel.register(LevelConfig, LevelModel, exist_ok=True)
    register_codec(LevelConfig.model_type, LevelCodec)
    LevelModel(LevelConfig()).save_pretrained(tmp_path / "levels")
    yield tmp_path / "levels"
    CODECS.pop(LevelConfig.model_type)


def test_a_codec_is_added_from_outside(level_codec, make_corpus, tmp_path):
    tokenizer = load_tokenizer(level_codec)
    assert isinstance(tokenizer, LevelCodec) and tokenizer.trained and tokenizer.config.frame_rate == 50

    samples = torch.linspace(-0.5, 0.5, 3 * HOP - 20).expand(2, 1, -1)
    mask = torch.arange(samples.shape[-1]) < torch.tensor([[samples.shape[-1]], [HOP]])
    codes = tokenizer.encode(samples, mask)
    assert codes.audio_codes.shape == (2, 2, 3)
    assert codes.audio_codes_mask.tolist() == [[True] * 3, [True, False, False]]
    decoded = tokenizer.decode(codes.audio_codes, mask.sum(1)).audio_values
    assert decoded.shape == samples.shape and decoded[0, 0, 0] == 0.5 and not decoded[1, 0, HOP:].any()

    values = {"run_dir": str(tmp_path / "codes"), "tokenizer": str(level_codec), "splits": ["train"]}
    values |= {"data": [{"path": str(make_corpus(3))}], "precision": "fp32", "num_workers": 0}
    corpus = CodedCorpus.open(encode.run(from_values(encode.Config, values)))
    assert corpus.metadata.fingerprint == tokenizer.fingerprint() and corpus.metadata.codebook_sizes == [16, 16]
    rows = {row["id"]: row["audio_codes"] for row in corpus.rows("train")}
    assert {name: codes.shape for name, codes in rows.items()} == {f"train{n}": (2, 15 + 5 * n) for n in range(3)}


PLUGIN = """
from test_journeys import LevelCodec, LevelConfig, LevelModel
from transformers import AutoConfig, AutoModel

from tokenizer.loading import register_codec

AutoConfig.register(LevelConfig.model_type, LevelConfig, exist_ok=True)
AutoModel.register(LevelConfig, LevelModel, exist_ok=True)
register_codec(LevelConfig.model_type, LevelCodec)
"""


def test_a_codec_comes_to_a_command_from_a_plugin(make_corpus, tmp_path, monkeypatch):
    (tmp_path / "my_codec.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    LevelModel(LevelConfig()).save_pretrained(tmp_path / "levels")
    words = ["encode", "run_dir=codes", "tokenizer=levels", f"data=[{{path: {make_corpus(2)}}}]", "precision=fp32"]
    try:
        assert "toy_levels" in CliRunner().invoke(cli.app, words).output
        assert LevelConfig.model_type not in CODECS  # without the plugin it cannot be loaded
        found = CliRunner().invoke(cli.app, [*words, "num_workers=0", "plugins=[my_codec]"])
        assert found.exit_code == 0, found.output
        assert CodedCorpus.open("codes").count("train") == 2
    finally:
        CODECS.pop(LevelConfig.model_type, None)
        sys.modules.pop("my_codec", None)


def test_a_model_type_has_one_wrapper(level_codec):
    register_codec(LevelConfig.model_type, LevelCodec)  # the same again is no error
    for taken, wrapper in ((LevelConfig.model_type, Codec), ("lmspt", LevelCodec), ("mimi", LevelCodec)):
        with pytest.raises(ValueError, match=taken):
            register_codec(taken, wrapper)
    with pytest.raises(ValueError, match="toy_levels"):  # what can be loaded names it
        load_tokenizer("no-such-tokenizer")


@pytest.fixture
def peak_measure(monkeypatch) -> Measure:
    """A toy measure, as a module of one's own registers it: how much louder the clip's peak is than the recording's."""

    def peak_ratio(audio: np.ndarray, reference: np.ndarray) -> float:
        return float(np.abs(audio).max() / np.abs(reference).max())

    monkeypatch.setattr(registry, "_MEASURES", dict(registry._MEASURES))
    return register_measure(
        Measure("peak_ratio", "peak", "Ratio of the peaks", "higher", peak_ratio, unit="times", digits=4)
    )


def test_a_measure_is_added_from_outside(peak_measure, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", tone(0.6), RATE_HZ)
    values = {"files": [str(tmp_path / "a.wav")], "tokenizers": "dmel-25hz", "judge": None, "precision": "fp32"}
    page = resynthesize.run(from_values(resynthesize.Config, values | {"output": str(tmp_path / "out")})).read_text()
    results = json.loads((tmp_path / "out" / "resynthesis.json").read_text())
    row = results["recordings"][0]["rows"][0]
    assert {*row} - {*row["n_measured"]} <= registry.RESERVED  # no measure may take another field's key
    assert {field.name for field in dataclasses.fields(QualitySummary)} - {"values"} <= registry.RESERVED
    ratio = row["peak_ratio"]
    assert 0 < ratio != 1 and results["means"][0]["peak_ratio"] == ratio
    for shown in (capsys.readouterr().out, page):
        assert "peak times" in shown and f"{ratio:.4f}" in shown
    assert "Ratio of the peaks: higher is better." in page

    clips = [compare_audio(tone(0.6), gain * tone(0.6), RATE_HZ) for gain in (0.5, 0.25)]
    summary = summarise_quality("reconstruction", "toy", clips, system="reconstruction")
    path = save_results(Results("T", [], quality=[summary]), tmp_path)
    assert json.loads(path.read_text())["quality"][0]["peak_ratio"] == pytest.approx(0.375)
    found = load_results(path)
    assert found.quality == [summary]
    for shown in (format_table(found), results_markdown(found), write_report(found, tmp_path).read_text()):
        assert "peak times" in shown and "0.3750 [0.2500, 0.5000]" in shown
        assert "Ratio of the peaks: higher is better." in shown


def test_a_measure_comes_to_a_command_from_a_plugin(tmp_path, monkeypatch):
    (tmp_path / "my_measure.py").write_text(
        "from eval.speech.measures.registry import Measure, register_measure\n"
        "def samples(audio): return len(audio)\n"
        "register_measure(Measure('samples', 'samples', 'Length', 'none', samples, needs_reference=False))\n"
    )
    monkeypatch.setattr(registry, "_MEASURES", dict(registry._MEASURES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    soundfile.write(tmp_path / "a.wav", tone(0.6), RATE_HZ)
    words = ["resynthesize", "a.wav", "-o", "out", "tokenizers=dmel-25hz", "judge=null", "measures=[samples]"]
    try:
        refused = CliRunner().invoke(cli.app, words)
        assert refused.exit_code == 2 and "measures: samples unknown; there are mel_distance_db" in refused.output
        found = CliRunner().invoke(cli.app, [*words, "plugins=[my_measure]"])
        assert found.exit_code == 0, found.output
    finally:
        sys.modules.pop("my_measure", None)
    entry = json.loads(Path("out/resynthesis.json").read_text())["recordings"][0]
    assert entry["measured"]["samples"] == entry["rows"][0]["samples"] == 0.6 * RATE_HZ


def test_results_of_a_measure_that_is_not_here_are_shown(peak_measure, tmp_path, monkeypatch):
    clips = [compare_audio(tone(0.6), gain * tone(0.6), RATE_HZ) for gain in (0.5, 0.25)]
    path = save_results(Results("T", [], quality=[summarise_quality("reconstruction", "toy", clips)]), tmp_path)
    monkeypatch.setattr(registry, "_MEASURES", {k: m for k, m in registry._MEASURES.items() if m != peak_measure})
    assert "peak_ratio" in (table := format_table(load_results(path))) and "0.375 [0.250, 0.500]" in table


def test_measures_are_chosen_by_name(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.6), RATE_HZ)
    values = {"files": [str(tmp_path / "a.wav")], "tokenizers": "dmel-25hz", "judge": None, "precision": "fp32"}
    values["output"] = str(tmp_path / "out")
    resynthesize.run(from_values(resynthesize.Config, values | {"measures": ["mel_distance_db"]}))
    row = json.loads((tmp_path / "out" / "resynthesis.json").read_text())["recordings"][0]["rows"][0]
    assert "mel_distance_db" in row and not {"stoi", "pesq", "level_difference_db"} & set(row)
    with pytest.raises(ValueError, match="measures: mel unknown; there are mel_distance_db"):
        resynthesize.plan(from_values(resynthesize.Config, values | {"measures": ["mel"]}))


def test_a_narrow_terminal_gets_many_measures_in_several_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "_MEASURES", dict(registry._MEASURES))
    names = [f"measure{i}" for i in range(8)]
    for i, name in enumerate(names):
        register_measure(Measure(name, f"measure no. {i}", "One of many", "higher", lambda *_: 0.5))
    soundfile.write(tmp_path / "a.wav", tone(0.6), RATE_HZ)
    values = {"files": [str(tmp_path / "a.wav")], "tokenizers": "dmel-25hz", "judge": None, "measures": names}
    resynthesize.run(from_values(resynthesize.Config, values | {"output": str(tmp_path / "out")}))
    printed = capsys.readouterr().out
    assert all(f"measure no. {i}" in printed for i in range(8)) and "\u2026" not in printed
    assert printed.count("dmel-25hz, 25 Hz") == printed.count("  reconstruction") > 1
