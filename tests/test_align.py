"""Forced alignment: the best CTC path, words in frames of codes, and the command that writes them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eval.judges.aligner import Aligner
from eval.judges.sphinx_aligner import SphinxAligner
from eval.speech.alignment import AlignmentError, ctc_align, word_frames
from recipes.commands import align
from recipes.config import ConfigError
from tokenizer.data.manifest import read_source

RATE, FRAME = 16_000, 320
VOCABULARY = {"<pad>": 0, " ": 1, "a": 2, "b": 3}
LEVELS = {0.2: 2, 0.4: 3}  # loudness of a frame -> the letter it says; quiet is the blank


def all_paths(log_probs, tokens, blank):
    """Score of the best path by trying every one."""
    best = -np.inf
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        collapsed = [t for i, t in enumerate(path) if t != blank and (i == 0 or t != path[i - 1])]
        if collapsed == list(tokens):
            best = max(best, sum(log_probs[i, t] for i, t in enumerate(path)))
    return best


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 1], [2, 1, 1], [2, 1, 2]])
def test_the_path_is_the_best_of_all(tokens):
    rng = np.random.default_rng(len(tokens))
    for _ in range(5):
        scores = np.log(rng.dirichlet(np.ones(3), size=6))
        spans = ctc_align(scores, tokens, blank=0)
        path = np.zeros(6, dtype=int)
        for token, (first, last) in zip(tokens, spans, strict=True):
            assert first < last
            path[first:last] = token
        assert (spans[1:, 0] >= spans[:-1, 1]).all()
        assert sum(scores[i, t] for i, t in enumerate(path)) == pytest.approx(all_paths(scores, tokens, 0))


def test_what_cannot_be_aligned_says_why():
    with pytest.raises(AlignmentError, match="longer than the audio: it takes 3 frames .* there are 2"):
        ctc_align(np.zeros((2, 3)), [1, 1], blank=0)
    with pytest.raises(AlignmentError, match="nothing to align"):
        ctc_align(np.zeros((2, 3)), [], blank=0)


def test_words_get_frames_in_order_none_empty_none_shared():
    assert word_frames([(0.0, 0.4), (0.41, 0.8)], 10.0, 10) == [[0, 4], [4, 8]]
    rng = np.random.default_rng(0)
    for _ in range(50):
        times = np.sort(rng.uniform(0, 2, 12)).reshape(6, 2)
        frames = word_frames([tuple(pair) for pair in times], 6.25, 7)
        assert all(first < last for first, last in frames) and frames[-1][1] <= 7 and frames[0][0] >= 0
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(frames))
    with pytest.raises(AlignmentError, match="3 words"):
        word_frames([(0, 1)] * 3, 1.0, 2)


def loudness_scores(piece):
    levels = np.abs(piece[: len(piece) // FRAME * FRAME]).reshape(-1, FRAME).max(1)
    ids = [next((i for level, i in LEVELS.items() if abs(level - value) < 0.05), 0) for value in levels]
    scores = np.full((len(ids), 4), np.log(0.01))
    scores[np.arange(len(ids)), ids] = np.log(0.97)
    return scores


def spoken(frames):
    """Frames of loudness -> audio."""
    return np.repeat(np.array(frames, dtype=np.float32), FRAME)


@pytest.fixture
def loudness(monkeypatch):
    """An aligner whose letters are levels, so that the boundaries are known."""
    calls = []

    def load(config, device):
        def scores(piece):
            calls.append(len(piece))
            return loudness_scores(piece)

        return Aligner({}, RATE, 30.0, VOCABULARY, 1, 0, scores)

    monkeypatch.setattr(align, "load_aligner", load)
    monkeypatch.setattr(align, "check_judge", lambda judge: {"kind": "ctc"})
    return calls


@pytest.fixture
def manifest(tmp_path):
    sounds = {
        "good": ([0] * 10 + [0.2] * 5 + [0.4] * 5 + [0] * 10 + [0.4] * 10 + [0] * 10, "Ab, b!"),
        "silent": ([0] * 50, "ab"),
        "long": ([0.2] * 5, "ab ab ab ab"),
        "last": ([0] * 20 + [0.2] * 10 + [0] * 20, "a"),
    }
    rows = []
    for name, (frames, text) in sounds.items():
        soundfile.write(tmp_path / f"{name}.wav", spoken(frames), RATE)
        rows.append({"id": name, "audio": f"{name}.wav", "text": text, "split": "test"})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "manifest.jsonl"


def config_for(manifest, run_dir, **keys):
    return align.Config(
        data=[align.DataSource(path=str(manifest))], splits=["test"], aligner="loudness", run_dir=str(run_dir), **keys
    )


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_known_boundaries_are_found_and_failures_named(loudness, manifest, tmp_path):
    before = manifest.read_bytes()
    written = align.run(config_for(manifest, tmp_path / "out", plot=1))
    good, last = read(written)
    assert manifest.read_bytes() == before
    assert [word["word"] for word in good["words"]] == ["Ab,", "b!"]
    times = [(word["start"], word["end"]) for word in good["words"]]
    assert np.allclose(times, [(0.2, 0.4), (0.6, 0.8)], atol=0.0201)
    assert [item["character"] for item in good["characters"]] == ["a", "b", "b"]
    assert np.allclose((last["words"][0]["start"], last["words"][0]["end"]), (0.4, 0.6), atol=0.0201)
    assert (written.parent / good["audio"]).is_file()
    skipped = {row["id"]: row["error"] for row in read(written.parent / "skipped.jsonl")}
    assert set(skipped) == {"silent", "long"} and "longer than the audio" in skipped["long"]
    assert "silent" in skipped["silent"]
    assert (tmp_path / "out" / "plots" / "000.png").stat().st_size > 1000


def test_a_manifest_of_which_nothing_is_aligned_is_no_finished_run(loudness, manifest, tmp_path):
    rows = [row | {"audio": f"elsewhere/{row['id']}.wav"} for row in read(manifest)]
    (tmp_path / "moved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = config_for(tmp_path / "moved.jsonl", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"none of the 4 utterances could be aligned; .*skipped.jsonl says why: .*no"):
        align.run(config)
    (tmp_path / "elsewhere").mkdir()
    for row in read(manifest):
        target = tmp_path / "elsewhere" / f"{row['id']}.wav"
        target.write_bytes((manifest.parent / row["audio"]).read_bytes())
    assert [row["id"] for row in read(align.run(config))] == ["good", "last"]  # the same command, now complete


def test_what_is_not_aligned_may_stay_as_it_was(loudness, manifest, tmp_path):
    kept = read(align.run(config_for(manifest, tmp_path / "out", keep_unaligned=True)))
    assert [row["id"] for row in kept] == ["good", "silent", "long", "last"]
    assert [bool(row.get("words")) for row in kept] == [True, False, False, True]
    found = read_source(align.DataSource(path=str(tmp_path / "out" / "manifest.jsonl"), columns=["words"]), "test")
    assert [bool(item.columns["words"]) for item in found] == [True, False, False, True]
    assert [item.text for item in found] == ["Ab, b!", "ab", "ab ab ab ab", "a"]
    assert len(read(tmp_path / "out" / "skipped.jsonl")) == 2


def test_a_killed_run_goes_on_to_the_same_result(loudness, manifest, tmp_path):
    whole = align.run(config_for(manifest, tmp_path / "whole"))
    n_calls = len(loudness)
    again = align.run(config_for(manifest, tmp_path / "again"))
    (again.parent / "complete.json").unlink()
    rows = again.parent / "checkpoints" / "rows.jsonl"
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[:2]) + lines[2][:9], encoding="utf-8")
    again.unlink()
    loudness.clear()
    align.run(config_for(manifest, tmp_path / "again"))
    assert again.read_bytes() == whole.read_bytes()
    assert 0 < len(loudness) < n_calls


def test_other_inputs_are_refused_and_the_same_go_on(loudness, manifest, tmp_path):
    """In a complete run and in one that was cut off."""
    config = config_for(manifest, tmp_path / "out")
    align.run(config)
    n_calls = len(loudness)
    before = manifest.read_text(encoding="utf-8")
    manifest.write_text(before.replace("Ab, b!", "Ab, a!"), encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"out was begun with other contents of data or aligner, .*--restart"):
            align.run(config)
        (tmp_path / "out" / "complete.json").unlink(missing_ok=True)
    manifest.write_text(before, encoding="utf-8")
    align.run(config)
    assert len(loudness) == n_calls  # all rows were kept


def test_an_aligner_whose_times_do_not_follow_the_audio_is_refused(loudness, manifest, tmp_path, monkeypatch):
    def load(config, device):
        def scores(piece):  # the same places whatever is heard
            fixed = np.full((len(piece) // FRAME, 4), np.log(0.01))
            fixed[:, 0] = np.log(0.9)
            fixed[0:3:2, 2:] = 0.0
            return fixed

        return Aligner({}, RATE, 30.0, VOCABULARY, 1, 0, scores)

    monkeypatch.setattr(align, "load_aligner", load)
    with pytest.raises(ConfigError, match="its times do not follow the audio"):
        align.run(config_for(manifest, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


DIGITS = Path(__file__).resolve().parents[2] / "shared" / "data" / "connected-digits"


@pytest.fixture(scope="module")
def sphinx():
    pytest.importorskip("pocketsphinx", reason="extra `eval` is not installed")
    return SphinxAligner()


def spoken_digits(limit):
    """Recordings of digits joined with silence, and where each begins and ends."""
    if not DIGITS.is_dir():
        pytest.skip(f"{DIGITS} is not there")
    for row in read(DIGITS / "manifest.jsonl"):
        if row["split"] != "test" or limit == 0:
            continue
        audio, _ = soundfile.read(DIGITS / row["audio"], dtype="float32")
        heard = np.concatenate([[1], (np.abs(audio) > 0).astype(int), [1]])
        edges = np.flatnonzero(np.diff(heard)).reshape(-1, 2)
        gaps = [(a, b) for a, b in edges.tolist() if b - a >= 0.045 * RATE and a > 0 and b < len(audio)]
        if len(gaps) == len(row["text"].split()) - 1:
            limit -= 1
            bounds = [0, *(sample for gap in gaps for sample in gap), len(audio)]
            yield audio, row["text"], np.array(bounds).reshape(-1, 2) / RATE


def test_pocketsphinx_finds_digits_where_they_were_joined(sphinx):
    errors = []
    for audio, text, wanted in spoken_digits(12):
        try:
            words = sphinx.align(audio, text).words
        except AlignmentError:
            continue
        assert [word["word"] for word in words] == text.split()
        errors += [(word["start"] - a, word["end"] - b) for word, (a, b) in zip(words, wanted, strict=True)]
    starts, ends = np.abs(np.array(errors)).T
    assert len(errors) > 40 and np.median(starts) < 0.07 and np.median(ends) < 0.12, (
        np.median(starts),
        np.median(ends),
    )


def test_pocketsphinx_s_times_move_with_the_audio_and_with_nothing_else(sphinx):
    audio, text, _ = next(spoken_digits(1))
    found = sphinx.align(audio, text)
    assert found == sphinx.align(audio, text) and found.words == sphinx.align(0.1 * audio, text).words
    later = sphinx.align(np.concatenate([np.zeros(RATE // 2, dtype=np.float32), audio]), text)
    shifts = [b["start"] - a["start"] for a, b in zip(found.words, later.words, strict=True)]
    assert np.median(shifts) == pytest.approx(0.5, abs=0.03)
    for entries in (found.words, found.characters, found.phones):
        assert all(0 <= entry["start"] <= entry["end"] <= len(audio) / RATE + 0.03 for entry in entries)
        assert all(a["end"] <= b["start"] + 1e-6 for a, b in itertools.pairwise(entries))
    assert "".join(entry["character"] for entry in found.characters) == text.replace(" ", "")


def test_what_pocketsphinx_cannot_align_is_said(sphinx):
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    for audio, text, why in (
        (noise, "zero grblfx", "does not know 'grblfx'"),
        (noise, "?!", "no words"),
        (np.zeros(RATE, dtype=np.float32), "zero", "silent"),
        (noise[:1600], "a long text for a tenth of a second", "cannot find"),
    ):
        with pytest.raises(AlignmentError, match=why):
            sphinx.align(audio, text)
