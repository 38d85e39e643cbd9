"""The benchmarks run, at tiny size, and their tables say what was measured. No figure of speed is asserted."""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import MimiConfig, MimiModel

from tokenizer.codecs.transformers_codecs import MimiCodec

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name):
    """A benchmark's module: the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_mimi():
    sizes = {"hidden_size": 16, "num_filters": 4, "codebook_size": 16, "codebook_dim": 8, "num_quantizers": 4}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    config = MimiConfig(
        upsampling_ratios=[5, 4], vector_quantization_hidden_dimension=8, upsample_groups=16, **sizes, **layers
    )
    return MimiCodec(MimiModel(config))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_loads_and_its_command_stands_where_it_is_looked_for(path):
    module = load(path.stem)
    if hasattr(module, "main"):
        assert f"python benchmarks/{path.name}" in module.__doc__
        assert f"python benchmarks/{path.name}" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def results(tmp_path):
    """A results.json as `slm evaluate` writes it, of one tokenizer's reconstruction."""
    from eval.protocol import Protocol
    from eval.protocol import TestSet as Scored
    from eval.results_file import save_results
    from eval.schema import Results, make_row
    from eval.speech.quality import QualitySummary
    from eval.text.normalisers import get_normaliser
    from eval.text.wer import score_pairs

    rates = score_pairs(["one two", "three four"], ["one two", "three for"], get_normaliser("basic"))
    protocol = Protocol("speech", {"name": "judge"}, "basic", "1", Scored("test", "0" * 64, 2), bootstrap_samples=100)
    row = make_row("reconstruction", "reconstruction", "runs/tiny", protocol, rates)
    clips = QualitySummary("reconstruction", "runs/tiny", 2, {"stoi": 0.87}, {}, [], system="reconstruction")
    save_results(Results(title="t", rows=[row], quality=[clips]), tmp_path)
    return tmp_path / "results.json"


def test_codecs_measures_each_codec_beside_mimi(monkeypatch, tmp_path, tiny_tokenizer):
    codecs = load("codecs")
    monkeypatch.setitem(codecs.PEERS, "Mimi", tiny_mimi)
    target = tmp_path / "table.md"
    threads = str(torch.get_num_threads())
    options = ["--peers", "Mimi", "--batch", "2", "--seconds", "0.5", "--rounds", "2", "--precisions", "fp32"]
    text = codecs.main([str(tiny_tokenizer), *options, "--threads", threads, "--output", str(target)])
    assert target.read_text() == text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    heads, ours, mimi = rows[0], rows[2], rows[3]
    assert mimi[heads.index("fp32 over Mimi fp32")] == "1.0"
    assert float(ours[heads.index("bit/s")]) == pytest.approx(12.5 * (5 + 4 + 4), abs=1)
    assert all(float(row[heads.index("fp32 encode")].rstrip("x")) > 0 for row in (ours, mimi))


def test_codecs_counts_multiply_adds_of_recurrent_and_plain_layers():
    codecs = load("codecs")

    class Counted(codecs.Codec):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.lstm, self.linear = torch.nn.LSTM(4, 8), torch.nn.Linear(10, 3, bias=False)
            self.config = argparse.Namespace(sampling_rate=100, frame_rate=10.0, hop_length=10)

        def encode_frames(self, samples):
            return self.linear(samples.reshape(-1, 10))

        def decode_frames(self, codes):
            return self.lstm(torch.zeros(len(codes), 1, 4))[0]

    encode, decode = codecs.count(codecs.Candidate("counted", Counted()), seconds=1.0)
    assert (encode, decode) == (10 * 10 * 3, 10 * 4 * 8 * (4 + 8))


def test_codecs_reads_scores_of_the_right_tokenizer(results):
    codecs = load("codecs")
    scores = codecs.quality(results, ["tiny", "other"])
    assert scores["tiny"].startswith("STOI 0.87, WER 25.0 % [")
    assert scores["other"] == ""


def test_growth_fits_slopes_and_draws_every_panel(tmp_path):
    growth = load("growth")
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert growth.slope(x, 3 * x) == pytest.approx(1)
    assert growth.slope(x, 3 * x**2) == pytest.approx(2)
    found = [(panel, np.stack([x, 3 * x, 100 + 0 * x], axis=1)) for panel in growth.panels(4, 1.0)]
    growth.draw(found, "title", tmp_path / "made" / "plot.svg")
    drawn = (tmp_path / "made" / "plot.svg").read_text()
    assert all(panel.title in drawn for panel, _ in found)
    assert growth.table(found).count("1.00, 1.00") == 6


def test_growth_panels_vary_one_thing_each():
    growth = load("growth")
    for panel in growth.panels(4, 1.0):
        values = [getattr(point, panel.varied) for point in panel.points]
        assert values == sorted(set(values))
        assert len(values) == 4
    steps = [panel for panel in growth.panels(4, 1.0) if panel.points[0].work == "step"]
    assert {panel.varied for panel in steps} == {"length_s", "batch", "corpus"}


@pytest.mark.parametrize("work", ["encode", "step"])
def test_growth_measures_a_point(tmp_path, tiny_tokenizer, work, monkeypatch):
    growth = load("growth")
    monkeypatch.setattr(growth, "CLIP_S", 0.5)
    monkeypatch.setattr(
        growth, "TEACHER", {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 16}
    )
    options = argparse.Namespace(tokenizer=str(tiny_tokenizer), manifest=None, precision="fp32")
    rows = growth.recordings(options, tmp_path)
    point = growth.Point(work, length_s=0.5, batch=1, corpus=2)
    measured = {"encode": growth.encode_point, "step": growth.step_point}[work](point, options, rows, tmp_path)
    assert measured[0] > 0 and measured[1] >= 0
    lines = [json.loads(line) for line in (tmp_path / "point.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines) >= 2


def test_real_shapes_grows_saves_reloads_and_trains_an_llm(tmp_path, capsys):
    real_shapes = load("real_shapes")
    sizes = real_shapes.QWEN_0_5B | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    sizes |= {"vocab_size": 320, "num_hidden_layers": 2, "num_key_value_heads": 1}
    options = argparse.Namespace(llm_sizes=sizes, speech_rows=100, llm_tokens=32, steps=1)
    for part in (real_shapes.grow, real_shapes.generate, real_shapes.train_lora, real_shapes.train_full):
        part(tmp_path, options)
    printed = capsys.readouterr().out
    assert "LLM: rows 320 -> 448" in printed  # 100 codes and the marks, padded to 64
    assert "all legal: True" in printed
    assert "LLM: LoRA, step 1 of 32 tokens" in printed and "LLM: full, step 1 of 32 tokens" in printed


def test_the_slms_speed_is_told_beside_the_bare_operations(tmp_path, monkeypatch, capsys):
    from slm_tiny import save_llm

    model, table = save_llm(tmp_path / "llm"), tmp_path / "table.md"
    small = ["--utterances", "12", "--transcripts", "3", "--steps", "2", "--tokens", "600", "--rounds", "1"]
    small += ["--threads", "1"]  # a second one would wait for the other tests
    monkeypatch.setattr(sys, "argv", ["slm_speed", *small, "--model", str(model), "--output", str(table)])
    module = load("slm_speed")
    monkeypatch.setattr(module, "BOOK", 16)
    monkeypatch.setattr(module, "GROWN", (16, 16))
    module.main()
    rows = table.read_text().splitlines()
    assert len([row for row in rows if row.startswith("| ")]) == 6 and rows[-1].startswith("| growing")


def test_scoring_candidates_agree_and_take_turns(tmp_path):
    scoring = load("scoring")
    options = argparse.Namespace(utterances=30, words=5, normaliser="basic", resamples=20, speakers=3)
    seconds = scoring.measure(scoring.candidates(options), rounds=2)
    assert all(len(found) == 2 for found in seconds.values()) and len(seconds) == 3
    assert scoring.table(seconds).count("\n") == 4 and "normaliser and jiwer, words |" in scoring.table(seconds)
    assert "the page of two rows" in scoring.rest(options, tmp_path)
    with pytest.raises(ValueError, match="the candidates disagree"):
        scoring.measure({scoring.OURS: lambda: 0.1, "other": lambda: 0.2}, rounds=1)


def test_the_patterns_of_codes_take_turns(tmp_path, monkeypatch):
    from slm_tiny import save_llm

    model, table = save_llm(tmp_path / "llm"), tmp_path / "table.md"
    small = ["--codebooks", "3", "--seconds", "0.4", "--rounds", "1", "--threads", "1", "--model", str(model)]
    monkeypatch.setattr(sys, "argv", ["patterns", *small, "--output", str(table)])
    module = load("patterns")
    monkeypatch.setattr(module, "BOOK", 16)
    module.main()
    rows = [line.split(" | ") for line in table.read_text().splitlines()[4:]]
    assert [row[0].strip("| ") for row in rows] == ["semantic", "flatten", "delay", "parallel"] * 2
    assert all(row[-1].startswith("1.00") for row in rows[2::4])


def test_multi_token_heads_are_timed_beside_a_token_a_pass(tmp_path, monkeypatch, capsys):
    from test_delay import grown

    from slm.model.modeling import save_slm
    from slm.model.multi_token import MultiTokenSettings, set_multi_token_heads

    speech_lm = grown(1, pattern="semantic")
    parts = (speech_lm.model, speech_lm.text_tokenizer, speech_lm.vocabulary)
    texts, table = tmp_path / "texts", tmp_path / "table.md"
    texts.write_text("bin blue\nlay red\n")
    small = ["multi_token", "--texts", str(texts), "--rounds", "1", "--threads", "1", "--output", str(table)]
    monkeypatch.setattr(sys, "argv", [*small, "--model", str(save_slm(*parts, tmp_path / "plain"))])
    with pytest.raises(SystemExit):
        load("multi_token").main()
    assert "no multi-token heads" in capsys.readouterr().err
    set_multi_token_heads(speech_lm.model, MultiTokenSettings(3))
    monkeypatch.setattr(sys, "argv", [*small, "--model", str(save_slm(*parts, tmp_path / "heads"))])
    load("multi_token").main()
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()[4:]]
    assert [row[0] for row in rows] == ["2, verified", "3, verified", "3, taken unseen"] * 4
    assert all(row[-1] == "2 of 2" for row in rows if "verified" in row[0])


def test_answers_that_go_wrong_at_their_end_are_counted_by_kind(tmp_path, monkeypatch):
    from test_delay import grown

    from slm.generation import SynthesizeOutput
    from slm.model.modeling import save_slm
    from slm.trained_on import TrainedOn

    module, speech_lm = load("stop_failures"), grown(1, pattern="semantic")
    known = TrainedOn("bin", 12, 2.0, (8.0, 10.0, 12.0), 4, 0.2, 0, tasks=("tts",))
    speech_lm.vocabulary = dataclasses.replace(speech_lm.vocabulary, trained_on=known)
    speech = np.random.default_rng(0).permutation(200)[None]
    looped = np.concatenate([speech[:, :5], np.tile([[3, 4]], 30)], axis=1)
    for codes, reason, kind in (
        (speech[:, :30], "stop", set()),
        (speech, "length", {"cut off"}),
        (looped, "stop", {"loop"}),  # drawn without a guard, and ended by the model at last
        (looped, "loop", {"loop"}),
        (speech[:, :2], "stop", {"too short"}),
        (speech[:, :0], "non_finite", {"not finite"}),
    ):
        answer = SynthesizeOutput(codes, reason)
        assert module.failures(speech_lm, "bin blue at f two now", answer) == kind
    assert module.long_texts(["a b", "c"], 6) == ["a b c a b", "c a b c"]
    parts = (speech_lm.model, speech_lm.text_tokenizer, speech_lm.vocabulary)
    texts, table = tmp_path / "texts", tmp_path / "table.md"
    texts.write_text("bin blue\nlay red\n")
    model = str(save_slm(*parts, tmp_path / "model"))
    module.main(["--texts", str(texts), "--model", model, "--threads", "1", "--output", str(table)])
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()[4:]]
    assert [row[2] for row in rows] == ["before", "limits", "limits, 2 retries", "in parts"] * 2
    assert all(row[3] == "4" for row in rows)  # two texts, two seeds


def test_an_engine_that_takes_ids_and_limits_gives_the_answers_of_this_package(tmp_path, monkeypatch):
    """vLLM is not installed here: its place takes a loop over the plain model, by what the engine is told alone."""
    from slm_tiny import FINGERPRINT, write_corpus
    from test_delay import grown

    from slm.model.modeling import save_slm

    class Engine:
        def __init__(self, model: str, **settings):
            self.model = transformers.AutoModelForCausalLM.from_pretrained(model)

        @torch.no_grad()
        def generate(self, prompts, settings, use_tqdm):
            return [SimpleNamespace(outputs=[self.answer(*pair)]) for pair in zip(prompts, settings, strict=True)]

        def answer(self, prompt, asked):
            ids = list(prompt["prompt_token_ids"])
            while (done := len(ids) - len(prompt["prompt_token_ids"])) < asked.max_tokens:
                scores = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
                allowed = [
                    i for i in asked.allowed_token_ids if i not in asked.stop_token_ids or done >= asked.min_tokens
                ]
                ids.append(allowed[int(scores[allowed].argmax())])
                if ids[-1] in asked.stop_token_ids:
                    break
            return SimpleNamespace(token_ids=ids[len(prompt["prompt_token_ids"]) :])

    engine = SimpleNamespace(
        LLM=Engine, SamplingParams=SimpleNamespace, TokensPrompt=lambda **prompt: prompt, __version__="0"
    )
    monkeypatch.setitem(sys.modules, "vllm", engine)
    speech_lm = grown(1, pattern="semantic")
    speech_lm.vocabulary = dataclasses.replace(speech_lm.vocabulary, fingerprint=FINGERPRINT)
    model = save_slm(speech_lm.model, speech_lm.text_tokenizer, speech_lm.vocabulary, tmp_path / "model")
    table = tmp_path / "table.md"
    small = ["--corpus", str(write_corpus(tmp_path / "codes")), "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["vllm_serving", *small, "--model", str(model), "--output", str(table)])
    for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    load("vllm_serving").main()
    rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()[4:]]
    assert [row[:2] for row in rows] == [["asr", "4 of 4"], ["tts", "4 of 4"]]
    assert all(int(row[2]) > 20 for row in rows)
