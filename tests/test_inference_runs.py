"""`slm transcribe` and `slm synthesize` at scale: processes, kills, batches; and every fault named and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from processes import exit_codes, start
from slm_scripted import scripted
from slm_standin import StandIn, make_slm
from slm_tiny import CODES, SENTENCES, utterances, write_corpus

from recipes.commands import synthesize, transcribe
from recipes.config import ConfigError, dump_config, load_config
from recipes.encoding.encoder import encode_batch
from recipes.inference import batches, long_recordings, setup, speech_files
from recipes.inference.batches import Outcome, make_batches
from recipes.inference.long_recordings import encode_short
from recipes.inference.speech_files import decoded
from recipes.runs.run_folder import RunFolder
from slm.generation import SpeechLM
from slm.model.modeling import save_slm
from tokenizer import LMSPTModel, load_tokenizer
from tokenizer.model.configuration import preset_config

PARTS = ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")
RECIPES = {"transcribe": transcribe, "synthesize": synthesize}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "wall_s"} for row in rows]


def write_manifest(folder: Path, texts: list[str], seconds: list[float] | None = None) -> Path:
    """Recordings of tones and their texts; those beyond the seconds have no file."""
    rows = []
    for i, text in enumerate(texts):
        rows.append({"id": f"u{i}", "audio": f"u{i}.wav", "text": text, "split": "test"})
        if seconds is not None and i < len(seconds):
            time_s = np.arange(round(seconds[i] * 16000)) / 16000
            soundfile.write(folder / f"u{i}.wav", 0.3 * np.sin(2 * np.pi * 200 * (i + 1) * time_s), 16000)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A loader of a recipe's configuration for seven utterances, the last of which has no recording."""
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: StandIn())
    make_slm(tmp_path)
    manifest = write_manifest(tmp_path, (SENTENCES * 2)[:7], [0.9, 1.6, 0.4, 2.0, 1.2, 0.7])

    def config(name: str, run: str, *overrides: str):
        own = [f"model={tmp_path / 'slm'}", "device=cpu", f"data.path={manifest}", f"run_dir={tmp_path / run}"]
        short = ["seconds_per_character=0", "min_seconds=1.5"] if name == "synthesize" else ["tokens_per_s=4"]
        own += [f"decoding.{item}" for item in ("batch_size=2", "temperature=0.7", *short)]
        return load_config(RECIPES[name].Config, None, [*own, *overrides])

    return config


def run_all(jobs: list[tuple[str, str]]) -> None:
    """What each of several processes does: the recipes one after the other, with the stand-in for a codec."""
    setup.load_tokenizer = lambda name, device=None: StandIn()
    for name, file in jobs:
        RECIPES[name].run(load_config(RECIPES[name].Config, file))


def test_several_processes_write_what_one_does(job, tmp_path) -> None:
    """Seven utterances in four batches, so that neither of two processes nor three have the same number of them."""
    whole = {name: lines(RECIPES[name].run(job(name, f"{name}-one"))) for name in RECIPES}
    assert len(whole["transcribe"]) == len(whole["synthesize"]) == 7
    assert "u6.wav" in whole["transcribe"][6]["error"] and whole["transcribe"][0]["hypothesis"] is not None
    files = []
    for name in RECIPES:
        config = job(name, f"{name}-three")
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
        files.append((name, str(tmp_path / f"{name}.yaml")))
    codes = exit_codes(start(run_all, files, log=tmp_path / "log", world=3))
    assert codes == [0, 0, 0], (tmp_path / "log").read_text()[-4000:]
    for name in RECIPES:
        assert timeless(lines(tmp_path / f"{name}-three" / "predictions.jsonl")) == timeless(whole[name])
        sidecar = json.loads((tmp_path / f"{name}-three" / "predictions.json").read_text())
        assert sidecar["n_processes"] == 3 and sidecar["n"] == 7
        assert sidecar["generated_tokens_per_s"] > 0 and sidecar["llm_real_time_factor"] > 0
        assert sidecar["tokenizer_real_time_factor"] > 0 and sidecar["generate_s"] > 0
        assert not list((tmp_path / f"{name}-three" / "checkpoints").glob("batch-*"))
    for row in whole["synthesize"]:
        one, three = (tmp_path / f"synthesize-{run}" / row["audio"] for run in ("one", "three"))
        assert one.read_bytes() == three.read_bytes()


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_killed_run_goes_on_to_the_same_predictions(job, tmp_path, monkeypatch, caplog, name) -> None:
    caplog.set_level("INFO", "slm")
    whole = timeless(lines(RECIPES[name].run(job(name, "whole"))))
    save, saved = Outcome.save, []

    def killed(self, path: Path) -> None:
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path.name)
        save(self, path)

    monkeypatch.setattr(batches.Outcome, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        RECIPES[name].run(job(name, "killed"))
    assert not (tmp_path / "killed" / "predictions.jsonl").exists()
    again = []
    monkeypatch.setattr(batches.Outcome, "save", lambda self, path: again.append(path.name) or save(self, path))
    assert timeless(lines(RECIPES[name].run(job(name, "killed")))) == whole
    assert len(again) == 2 and not set(again) & set(saved)  # what was done is not done again
    assert "going on: 2 of 4 batches are done" in caplog.text
    assert not list((tmp_path / "killed" / "checkpoints").glob("batch-*"))


def test_batches_hold_like_lengths_and_a_long_text_is_alone() -> None:
    lengths, sizes = [3, 9, 1, 7, 5, 2], [1, 5, 1, 1, 1, 1]
    found = make_batches(lengths, sizes, 3)
    assert found == [[1], [3, 4, 0], [5, 2]]
    assert make_batches([], [], 3) == []


def test_several_processes_need_a_folder(job, monkeypatch) -> None:
    config = job("synthesize", "run")
    config.run_dir, config.data, config.text = "", None, "lay red"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="run_dir: needed with several processes"):
        synthesize.run(config)


def test_recordings_are_encoded_together_as_alone(tiny_tokenizer, monkeypatch) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    rng, rate, seen = np.random.default_rng(0), tokenizer.config.sampling_rate, []
    waveforms = [rng.normal(0, 0.1, round(seconds * rate)).astype("f4") for seconds in (0.9, 2.0, 0.4, 0.8, 3.5)]
    real = tokenizer.encode
    tokenizer.encode = lambda values, mask: seen.append(len(values)) or real(values, mask)
    monkeypatch.setattr(long_recordings, "ENCODED_S", 3.0)
    found = dict(encode_short(tokenizer, waveforms, "fp32", "cpu"))
    assert seen == [3, 1, 1] and sorted(found) == [0, 1, 2, 3, 4]
    for number, waveform in enumerate(waveforms):
        (alone,) = encode_batch(tokenizer, [waveform], "fp32", "cpu")
        assert found[number].end_s == len(waveform) / rate and found[number].codes.shape == alone.shape
        assert (found[number].codes == alone).mean() > 0.99
    assert list(encode_short(tokenizer, [], "fp32", "cpu")) == []


def test_answers_are_decoded_together_as_alone(tiny_tokenizer, monkeypatch) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    rng, size = np.random.default_rng(0), tokenizer.config.codebook_sizes[0]
    codes = [rng.integers(0, size, (1, n)) for n in (5, 9, 4, 30, 2, 1)]
    batches_seen, real = [], tokenizer.decode
    tokenizer.decode = lambda values: batches_seen.append(tuple(values.shape)) or real(values)
    monkeypatch.setattr(speech_files, "DECODED_S", 27 / tokenizer.config.frame_rate)
    together = list(decoded(tokenizer, iter(codes), "cpu"))
    assert batches_seen == [(3, 1, 9), (1, 1, 30), (2, 1, 2)]
    for item, waveform in zip(codes, together, strict=True):
        with torch.inference_mode():
            alone = real(torch.from_numpy(item)[None]).audio_values[0, 0].clamp(-1, 1).numpy()
        np.testing.assert_allclose(waveform, alone, atol=1e-4)


class Tones(StandIn):
    """Each frame is a tone of its code's own, whatever stands beside it."""

    decoder_receptive_field_frames = receptive_field_frames = 3

    def __init__(self) -> None:
        super().__init__()
        self.config.hop_length = 1280

    def decode(self, audio_codes, lengths=None):
        time_s = torch.arange(1280) / 16000
        values = 0.3 * torch.sin(2 * math.pi * 100 * (audio_codes[:, 0, :, None] + 1) * time_s)
        return SimpleNamespace(audio_values=values.reshape(len(audio_codes), 1, -1))


class Silences(StandIn):
    """Code 0 is silence, code 1 is no number; all else is a tone."""

    def decode(self, audio_codes, lengths=None):
        values = 0.3 * torch.sin(torch.arange(audio_codes.shape[-1] * 1280) * 0.05).repeat(len(audio_codes), 1, 1)
        for row, (first, *_) in enumerate(audio_codes[:, 0].tolist()):
            values[row] *= {0: 0.0, 1: math.nan}.get(first, 1.0)
        return SimpleNamespace(audio_values=values)


def unlike_words(n: int) -> list[str]:
    return [f"{'abcdefghij'[i]} sentence of its own" for i in range(n)]


def test_every_fault_is_named_and_counted(tmp_path, monkeypatch, caplog) -> None:
    """A model whose end never comes, one in a loop, broken scores, silence and broken samples, beside a good answer."""
    rng = np.random.default_rng(0)
    tail = rng.integers(2, CODES, 400).tolist()
    texts = unlike_words(6)
    answers = [tail[:30], tail, [2, 3] * 200, math.nan, [0, *tail[:30]], [1, *tail[:30]]]
    speech_lm = scripted(lambda prompt, said: say(prompt, said))
    vocabulary, first = speech_lm.vocabulary, int(speech_lm.vocabulary.offsets[0])
    openings = [vocabulary.encode_text(speech_lm.text_tokenizer, text)[0] for text in texts]
    assert len(set(openings)) == 6

    def say(prompt: list[int], said: list[int]) -> int | float:
        codes = answers[next(openings.index(i) for i in prompt if i in openings)]
        if isinstance(codes, float):
            return codes
        return first + codes[len(said)] if len(said) < len(codes) else vocabulary.speech_end_id

    save_slm(speech_lm.model, speech_lm.text_tokenizer, vocabulary, tmp_path / "slm")
    monkeypatch.setattr(SpeechLM, "load", lambda *arguments: speech_lm)
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: Silences())
    manifest = write_manifest(tmp_path, texts)
    given = [f"model={tmp_path / 'slm'}", "device=cpu", f"data.path={manifest}", f"run_dir={tmp_path / 'run'}"]
    rows = lines(synthesize.run(load_config(synthesize.Config, None, [*given, "decoding.retries=1"])))
    assert [row["faults"] for row in rows] == [[], ["length"], ["loop"], ["non_finite"], ["silence"], ["non_finite"]]
    reasons = [row["finish_reason"] for row in rows]
    assert reasons == ["stop", "length", "loop", None, "stop", None]
    assert [row["truncated"] for row in rows] == [False, True, True, False, False, False]
    assert [row["attempts"] for row in rows] == [1, 2, 2, 2, 1, 1]
    assert "scores are not finite" in rows[3]["error"] and "samples that are not finite" in rows[5]["error"]
    assert all((row["audio"] is None) == (row["error"] is not None) for row in rows)
    assert len(list((tmp_path / "run" / "audio").iterdir())) == 4
    sidecar = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert sidecar["faults"] == {
        "length": {"n": 1, "ids": ["u1"]},
        "loop": {"n": 1, "ids": ["u2"]},
        "silence": {"n": 1, "ids": ["u4"]},
        "non_finite": {"n": 2, "ids": ["u3", "u5"]},
    }
    assert (sidecar["n_truncated"], sidecar["n_failed"], sidecar["n_retried"]) == (2, 2, 3)
    summary = json.loads((tmp_path / "run" / "complete.json").read_text())["summary"]
    assert (summary["n_length"], summary["n_loop"], summary["n_silence"], summary["n_non_finite"]) == (1, 1, 1, 2)
    for told in ("1 cut off at their budget: u1", "1 cut off in a loop: u2", "1 silent: u4", "finite: u3, u5"):
        assert told in caplog.text


def test_a_transcript_s_faults_are_named_and_counted(tmp_path, monkeypatch, caplog) -> None:
    speech_lm = scripted(lambda prompt, said: write(prompt, said))
    vocabulary = speech_lm.vocabulary
    word = vocabulary.encode_text(speech_lm.text_tokenizer, "red").tolist()
    asked = [row["audio_codes"].shape[1] for row in utterances(4, seed=2)]
    assert len(set(asked)) == 4

    def write(prompt: list[int], said: list[int]) -> int | float:
        number = asked.index(prompt.index(vocabulary.mark_id("<|/speech|>")) - prompt.index(vocabulary.speech_id) - 1)
        if number == 2:
            return math.nan
        if number == 1 or len(said) < len(word):
            return word[len(said) % len(word)]
        return vocabulary.end_id

    save_slm(speech_lm.model, speech_lm.text_tokenizer, vocabulary, tmp_path / "slm")
    monkeypatch.setattr(SpeechLM, "load", lambda *arguments: speech_lm)
    write_corpus(tmp_path / "codes")
    given = [f"model={tmp_path / 'slm'}", "device=cpu", f"corpus={tmp_path / 'codes'}", f"run_dir={tmp_path / 'run'}"]
    rows = lines(transcribe.run(load_config(transcribe.Config, None, given)))
    assert [row["faults"] for row in rows] == [[], ["loop"], ["non_finite"], []]
    assert rows[0]["hypothesis"] == "red" and rows[1]["truncated"] and rows[1]["hypothesis"].startswith("redred")
    assert rows[2]["hypothesis"] is None and "not finite" in rows[2]["error"]
    sidecar = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert sidecar["faults"]["loop"] == {"n": 1, "ids": ["u1"]} and sidecar["n_failed"] == 1
    assert "1 cut off in a loop: u1" in caplog.text
    given[-1] = f"run_dir={tmp_path / 'best'}"
    beams = [*given, "decoding.num_beams=3", "decoding.n_best=2"]
    found = lines(transcribe.run(load_config(transcribe.Config, None, beams)))
    assert len(found[0]["n_best"]) == 2 and found[0]["n_best"][0] == found[0]["hypothesis"]


def test_guidance_that_was_not_learnt_is_told(job, tmp_path, caplog) -> None:
    synthesize.run(job("synthesize", "guided", "decoding.guidance=2.0", "limit=2"))
    assert "has not learnt to speak without a prompt" in caplog.text and "noise.drop_prompt=0.1" in caplog.text
    assert len(lines(tmp_path / "guided" / "predictions.jsonl")) == 2


def test_codes_that_come_bit_by_bit_sound_as_the_whole(tiny_tokenizer) -> None:
    """What has been played no later code changes; a causal tokenizer waits for less, one of another kind for all."""
    looking = load_tokenizer(str(tiny_tokenizer))
    torch.manual_seed(0)
    sizes = {f"{part}_width": 32 for part in PARTS} | {"head_dim": 16, "latent_dim": 32}
    causal = LMSPTModel(preset_config("nano-12.5hz-causal", **sizes)).eval()
    opaque = SimpleNamespace(config=looking.config, decode=looking.decode)
    rng, first = np.random.default_rng(0), []
    codes = rng.integers(0, 16, (1, 3 * looking.decoder_receptive_field_frames))
    parts = np.split(codes, [7, 7, 9, 30, codes.shape[1] - 1], axis=1)
    for tokenizer in (looking, causal, opaque):
        played = list(speech_files.decoded_stream(tokenizer, iter(parts), "cpu"))
        with torch.inference_mode():
            whole = tokenizer.decode(torch.from_numpy(codes)[None]).audio_values[0, 0].clamp(-1, 1).numpy()
        np.testing.assert_allclose(np.concatenate(played), whole, atol=1e-4)
        first.append(next(i for i, waveform in enumerate(played) if len(waveform)))
    assert first == [3, 0, 0] and len(played) == 1


def test_a_stream_writes_the_file_that_is_written_at_once(job, tmp_path, monkeypatch, caplog) -> None:
    """Sentence after sentence into a file that grows; the samples, the pauses and what is told are the same."""
    caplog.set_level("INFO", "slm")
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: Tones())
    given = ["text=Lay red by a nine please. Set white in z four soon!", "max_characters=26", "run_dir=''"]
    written = {}
    for name in ("whole", "stream"):
        caplog.clear()
        file = tmp_path / f"{name}.wav"
        config = job("synthesize", "none", "data=null", *given, f"output={file}", f"stream={name == 'stream'}")
        assert synthesize.run(config) == file
        written[name] = file.read_bytes(), [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert written["stream"] == written["whole"] and len(written["whole"][0]) > 16000
    assert "first sound after" in caplog.text
    with pytest.raises(ConfigError, match="stream: for a single text"):
        job("synthesize", "other", "stream=true")


def test_a_folder_with_an_older_default_is_still_complete(tmp_path, monkeypatch) -> None:
    """4 s for any text is such a default: nobody asked for it."""
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: StandIn())
    make_slm(tmp_path)
    manifest = write_manifest(tmp_path, SENTENCES[:1])
    given = [f"model={tmp_path / 'slm'}", "device=cpu", f"data.path={manifest}", f"run_dir={tmp_path / 'run'}"]
    before = load_config(synthesize.Config, None, [*given, "decoding.min_seconds=4.0"])
    made = synthesize.run(before)
    text = (tmp_path / "run" / "config.yaml").read_text()
    new = ("retries", "guidance", "min_seconds_per_character", "loop_s", "stream")
    kept = "".join(line for line in text.splitlines(True) if line.split(":")[0].strip() not in new)
    (tmp_path / "run" / "config.yaml").write_text(kept)
    RunFolder(tmp_path / "run").mark_complete({})
    rows = made.read_bytes()
    assert synthesize.run(load_config(synthesize.Config, None, given)) == made and made.read_bytes() == rows
    with pytest.raises(ConfigError, match="min_seconds: was 4"):
        synthesize.run(load_config(synthesize.Config, None, [*given, "decoding.min_seconds=3.0"]))
