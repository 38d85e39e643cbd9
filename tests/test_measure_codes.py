"""`slm measure-codes`: the probe, codes after changes, and the command from a corpus to its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from slm_tiny import metadata, utterances

from eval.codes.probe import CodedText, CodeProbe, ProbeConfig, train_probe
from recipes.commands import measure_codes
from recipes.config import ConfigError, load_config
from recipes.scoring.code_robustness import ALONE, ROUND_TRIP, measure_robustness
from slm.corpus import CodedCorpusWriter
from tokenizer import load_tokenizer
from tokenizer.data.utterances import Utterance

SMALL = ProbeConfig(hidden_size=32, steps=150, check_steps=50, batch_size=4, learning_rates=[1e-2], dropout=0.0)


def spelled(text: str, seed: int) -> CodedText:
    """Codes that spell a text, three frames a letter; a second book of noise."""
    letters = np.repeat([ord(letter) - ord("a") for letter in text], 3)
    noise = np.random.default_rng(seed).integers(0, 26, len(letters))
    return CodedText(np.stack([letters, noise]), text)


def test_a_probe_reads_what_codes_spell_and_not_what_noise_does() -> None:
    train, valid, test = ([spelled(text, n) for n, text in enumerate(part)] for part in (WORDS[:8], WORDS[8:10], WORDS))
    found = train_probe(train, valid, test, [26, 26], 50.0, SMALL)
    assert found.hypotheses[:8] == WORDS[:8]
    assert found.chosen == min(found.trials, key=lambda trial: trial.valid_cer)
    hidden = [[CodedText(item.codes[::-1], item.text) for item in part] for part in (train, valid, test)]
    assert train_probe(*hidden, [26, 26], 50.0, SMALL).chosen.valid_cer > found.chosen.valid_cer + 0.2
    again = train_probe(train, valid, test, [26, 26], 50.0, SMALL)
    assert again.hypotheses == found.hypotheses  # the same seed


WORDS = ["bead", "cafe", "dabfe", "fade", "abed", "face", "deaf", "cab", "bade", "decaf"]


def test_a_probe_s_batch_is_its_utterances_alone() -> None:
    torch.manual_seed(0)
    model = CodeProbe([12, 12], 5, SMALL, 2).eval()
    codes = [torch.randint(0, 12, (2, length)) for length in (9, 4)]
    padded = torch.nn.utils.rnn.pad_sequence([item.T for item in codes], batch_first=True).transpose(1, 2)
    together = model(padded, torch.tensor([9, 4]))
    for row, item in zip(together, codes, strict=True):
        alone = model(item[None], torch.tensor([item.shape[1]]))[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    rng, lines = np.random.default_rng(0), []
    for number, text in enumerate(["bin blue", "set red", "lay green", "place white", "bin red", "set blue"]):
        samples = 0.1 * np.cumsum(rng.normal(size=16000 + 2000 * number)) / 40
        soundfile.write(folder / f"{number}.wav", np.clip(samples, -0.9, 0.9), 16000)
        split = ("train", "train", "train", "valid", "test", "test")[number]
        words = [{"word": word, "start": 0.4 * n, "end": 0.4 * n + 0.3} for n, word in enumerate(text.split())]
        line = {"id": f"u{number}", "audio": f"{number}.wav", "text": text, "speaker": "a", "split": split}
        lines.append(json.dumps(line | {"words": words, "duration": len(samples) / 16000}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_an_encoding_agrees_with_itself_and_noise_changes_it(recordings) -> None:
    tokenizer = load_tokenizer("embedded-12.5hz")
    some = [Utterance(f"u{n}", str(recordings / f"{n}.wav")) for n in (0, 5)]
    found = measure_robustness(tokenizer, [*some, Utterance("gone", "gone.wav")], 60.0, "cpu")
    assert (found["n_scored"], found["n_failed"], found["gaps"]) == (2, 1, {})
    shares = {item["change"]: item["by_book"] for item in found["changes"]}
    assert shares[ALONE][0] > 0.99
    assert shares["noise, 20 dB SNR"][0] < shares[ALONE][0] and ROUND_TRIP in shares
    assert measure_robustness(tokenizer, some, 60.0, "cpu")["changes"] == found["changes"]


def configured(recordings: Path, name: str, *more: str) -> measure_codes.Config:
    probe = ["hidden_size=16", "steps=4", "check_steps=2", "learning_rates=[0.01]"]
    own = [f"run_dir={recordings / name}", f"data=[{{path: {recordings / 'manifest.jsonl'}}}]", "device=cpu"]
    return load_config(measure_codes.Config, None, [*own, *(f"probe.{one}" for one in probe), *more])


def test_from_recordings_to_the_file(recordings, capsys, monkeypatch) -> None:
    config = configured(recordings, "all", "tokenizer=embedded-12.5hz")
    assert "encoded first" in measure_codes.plan(config)
    result = json.loads(measure_codes.run(config).read_text())
    assert result["use"]["nominal_bps"] == pytest.approx(1100)
    assert len(result["language_model"]["books"]) == len(result["codebook_sizes"])
    assert result["characters"]["aligned"] == "words" and result["characters"]["n_scored"] == 3
    assert result["probe"]["n_scored"] == 2 and "snmi" in result["gaps"]
    shown = capsys.readouterr().out
    assert "Codes by book" in shown and "Codes after a change" in shown and "no snmi: " in shown
    # Complete: nothing is measured again, the tables are shown again.
    monkeypatch.setattr(measure_codes.Job, "make", lambda self, name: pytest.fail(name))
    measure_codes.run(config)
    assert capsys.readouterr().out == shown


def test_an_id_prefix_joins_the_alignments_of_two_sources_to_their_codes(tmp_path) -> None:
    """Ids that both sources have, at first: the codes spell their own source's text, a letter a frame."""
    texts = {"": ["bead", "cafe", "fade"], "b-": ["deaf", "abed", "cabs"]}
    writer = CodedCorpusWriter(tmp_path / "codes", metadata(codebook_sizes=[26, 26], frame_rate=10.0))
    rows, sources = [], []
    for name, (prefix, spoken) in zip(("one", "two"), texts.items(), strict=True):
        (tmp_path / name).mkdir()
        lines = []
        for number, text in enumerate(spoken):
            spans = [{"character": c, "start": n / 10, "end": (n + 1) / 10} for n, c in enumerate(text)]
            lines.append(json.dumps({"id": f"u{number}", "audio": "a.wav", "text": text, "characters": spans}))
            codes = np.stack([[ord(c) - ord("a") for c in text]] * 2)
            row = {"id": f"{prefix}u{number}", "text": text, "speaker": "s", "duration": len(text) / 10}
            rows.append(row | {"audio_codes": codes})
        (tmp_path / name / "manifest.jsonl").write_text("\n".join(lines) + "\n")
        sources.append(f"{{path: {tmp_path / name / 'manifest.jsonl'}, id_prefix: '{prefix}'}}")
    writer.write_shard("train", 0, 1, rows)
    writer.finish()

    def characters(run: str, *of: str) -> dict:
        own = [f"run_dir={tmp_path / run}", f"corpus={tmp_path / 'codes'}", f"data=[{', '.join(of)}]", "device=cpu"]
        config = load_config(measure_codes.Config, None, [*own, "measures=[characters]"])
        return json.loads(measure_codes.run(config).read_text())["characters"]

    both = characters("both", *sources)
    assert both["n_scored"] == 6 and both["books"][0]["share"] == pytest.approx(1)
    alone = characters("alone", sources[1])
    assert alone["n_scored"] == 3 and alone["books"][0]["share"] == pytest.approx(1)
    # Without its prefix the second source's alignments take the place of the first's.
    mixed = characters("mixed", sources[0], sources[1].replace("b-", ""))
    assert mixed["n_scored"] == 3 and mixed["books"][0]["share"] < 0.9


def test_what_is_missing_is_a_gap_and_the_rest_stands(recordings, tmp_path) -> None:
    writer = CodedCorpusWriter(tmp_path / "codes", metadata())
    writer.write_shard("train", 0, 1, utterances(8))
    writer.finish()
    own = [f"run_dir={tmp_path / 'run'}", f"corpus={tmp_path / 'codes'}", "device=cpu"]
    config = load_config(measure_codes.Config, None, own)
    result = json.loads(measure_codes.run(config).read_text())
    assert result["use"]["n_scored"] == 8
    for name in ("language_model", "characters", "probe", "robustness"):
        assert result[name] is None and "needs" in result["gaps"][name]


def test_what_is_wrong_is_named(recordings, tmp_path) -> None:
    with pytest.raises(ConfigError, match="nothing to measure: give corpus=FOLDER"):
        measure_codes.plan(load_config(measure_codes.Config, None, [f"run_dir={tmp_path / 'x'}"]))
    with pytest.raises(ConfigError, match="measures: loudness unknown; did you mean `robustness`. there are use"):
        configured(recordings, "y", "measures=[loudness]")
    with pytest.raises(ConfigError, match=r"probe\.books=9"):
        measure_codes.run(configured(recordings, "z", "tokenizer=embedded-12.5hz", "probe.books=9"))
