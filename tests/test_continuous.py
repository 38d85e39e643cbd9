"""An LLM that hears continuous features: alone as in a batch, what learns and what does not, and what users meet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from slm_tiny import save_llm, tiny_model
from test_slm_training import KillAt, Poison

from recipes.commands import export, finetune_continuous, transcribe
from recipes.config import ConfigError, load_config
from recipes.continuous.encoder import encode_recordings, load_encoder
from slm.model.continuous import ContinuousLM, Projector, ProjectorSettings, load_continuous
from slm.model.modeling import ModelError
from tokenizer.data.utterances import AudioError
from tokenizer.teacher.whisper import TeacherConfig

TEXTS = ["bin blue", "set red now", "lay green at two", "place white"]
WIDTH = 12


def tiny(kind: str = "qwen2") -> ContinuousLM:
    llm = tiny_model(kind, 64)
    torch.manual_seed(1)
    projector = Projector(WIDTH, llm.get_input_embeddings(), ProjectorSettings(stack=2, hidden=16))
    return ContinuousLM(llm, projector, first_id=1, end_id=2).eval()


def spoken(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    features = [torch.randn(length, WIDTH, generator=draw) for length in (9, 4, 7)]
    return features, [torch.tensor(ids) for ids in ([5, 6, 7], [8, 9], [10, 11, 12, 13])]


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
def test_a_batch_is_its_utterances_alone(kind) -> None:
    model, (features, texts) = tiny(kind), spoken()
    alone = [model([f], [t]).item() for f, t in zip(features, texts, strict=True)]
    assert model(features, texts).item() == pytest.approx(np.mean(alone), rel=1e-5)
    written = [model.generate([one], [6])[0] for one in features]
    assert model.generate(features, [6, 6, 6]) == written
    assert [len(ids) for ids in model.generate(features, [2, 3, 4])] <= [2, 3, 4]


def test_the_loss_is_that_of_the_transcript_written_out() -> None:
    """Position by position, from the logits of the whole model."""
    model, (features, texts) = tiny(), spoken()
    prompt = model.prompts(features[:1])[0]
    assert len(prompt) == 1 + 5 + 2  # bos, ceil(9 / 2) positions, two marks
    row = torch.cat([prompt, model.llm.get_input_embeddings()(texts[0])])
    logits = model.llm(inputs_embeds=row[None]).logits[0, len(prompt) - 1 :]
    answer = torch.tensor([*texts[0].tolist(), 2])
    expected = torch.nn.functional.cross_entropy(logits, answer)
    assert model(features[:1], texts[:1]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_learns_by_heart_what_it_hears() -> None:
    model, (features, texts) = tiny(), spoken()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(features, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.projector.parameters())
    assert model.generate(features, [9] * 3) == [[*text.tolist(), 2] for text in texts]
    assert model.generate([features[1]], [9]) != model.generate([features[2]], [9])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """An LLM, and a manifest of tones with texts."""
    folder = tmp_path_factory.mktemp("continuous")
    save_llm(folder / "llm")
    rows = []
    for number, text in enumerate(TEXTS * 3):
        seconds = 0.5 + 0.1 * (number % 4)
        tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * (number % 4)) * np.arange(int(16000 * seconds)) / 16000)
        soundfile.write(folder / f"{number}.wav", tone, 16000)
        split = ("train", "valid", "test")[number // 4]
        row = {"id": f"u{number}", "audio": f"{number}.wav", "text": text, "speaker": "a"}
        rows.append(json.dumps(row | {"duration": len(tone) / 16000, "split": split}))
    (folder / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def configured(world: Path, name: str, *more: str) -> finetune_continuous.Config:
    own = [f"run_dir={world / name}", f"model={world / 'llm'}", f"data=[{{path: {world / 'manifest.jsonl'}}}]"]
    steps = ["steps=4", "batch_size=2", "save_steps=2", "validate_steps=4", "log_steps=1", "learning_rate=0.01"]
    return load_config(
        finetune_continuous.Config, None, [*own, "precision=fp32", *(f"training.{one}" for one in steps), *more]
    )


@pytest.fixture(scope="module")
def trained(world) -> Path:
    return finetune_continuous.run(configured(world, "full"))


def test_features_of_a_recording_do_not_depend_on_its_batch() -> None:
    encoder = load_encoder(TeacherConfig("embedded-recogniser"), "cpu")
    waveforms = [np.random.default_rng(n).normal(0, 0.1, size).astype(np.float32) for n, size in ((0, 8000), (1, 5000))]
    together = encode_recordings(encoder, [*waveforms, waveforms[0]])
    alone = [encode_recordings(encoder, [one])[0] for one in waveforms]
    for one, other in zip(together, [*alone, alone[0]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="encoder: "):
        load_encoder(TeacherConfig("no/such"), "cpu")


def test_what_learns(world, trained) -> None:
    """In full all of the LLM moves; frozen nothing of it; by adapters what is saved is a plain LLM again."""
    before = load_file(world / "llm" / "model.safetensors")
    full = load_file(trained / "llm" / "model.safetensors")
    assert not any(torch.equal(full[name], weight) for name, weight in before.items() if weight.ndim > 1)
    frozen = finetune_continuous.run(configured(world, "frozen", "freeze_llm=true"))
    kept = load_file(frozen / "llm" / "model.safetensors")
    assert all(torch.equal(kept[name], weight) for name, weight in before.items())
    adapted = finetune_continuous.run(configured(world, "lora", "lora.rank=2"))
    merged = load_file(adapted / "llm" / "model.safetensors")
    assert merged.keys() == before.keys() and not torch.equal(
        *(w["model.layers.0.self_attn.q_proj.weight"] for w in (merged, before))
    )
    assert torch.equal(merged["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_resumed_is_uninterrupted_and_complete_is_skipped(world, trained, monkeypatch) -> None:
    config = configured(world, "cut")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_continuous, "TrainerProgress", lambda name: KillAt(3))
        finetune_continuous.run(config)
    model = finetune_continuous.run(config)
    for file in ("llm/model.safetensors", "projector.safetensors"):
        one, other = load_file(trained / file), load_file(model / file)
        assert all(torch.equal(one[name], other[name]) for name in one), file
    monkeypatch.setattr(finetune_continuous, "ContinuousTrainer", None)
    assert finetune_continuous.run(config) == model


def test_steps_that_are_never_finite_stop_the_training(world, monkeypatch) -> None:
    monkeypatch.setattr(finetune_continuous, "TrainerProgress", lambda name: Poison(range(2, 99)))
    with pytest.raises(FloatingPointError, match="5 steps in a row, to step 6"):
        finetune_continuous.run(configured(world, "poisoned", "training.steps=9"))
    assert not (world / "poisoned" / "model").exists()


def test_transcribe_writes_what_others_write(world, trained, tmp_path) -> None:
    source = [f"data={{path: {world / 'manifest.jsonl'}}}", f"model={trained}", "device=cpu"]
    config = load_config(transcribe.Config, None, [*source, f"run_dir={tmp_path / 'asr'}"])
    assert transcribe.plan(config)["utterances"] == 4
    rows = [json.loads(line) for line in transcribe.run(config).read_text().splitlines()]
    assert [row["reference"] for row in rows] == TEXTS and all(row["hypothesis"] is not None for row in rows)
    sidecar = json.loads((tmp_path / "asr" / "predictions.json").read_text())
    assert (sidecar["frame_rate"], sidecar["fingerprint"], sidecar["pattern"]) == (12.5, "", "continuous")
    singles = load_config(transcribe.Config, None, [*source, f"run_dir={tmp_path / 'one'}", "decoding.batch_size=1"])
    alone = [json.loads(line)["hypothesis"] for line in transcribe.run(singles).read_text().splitlines()]
    assert alone == [row["hypothesis"] for row in rows]


def test_what_is_wrong_is_named(world, trained, tmp_path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "long.wav", np.full(16000 * 31, 0.1), 16000)
    for name in ("silent.wav", "long.wav"):
        config = load_config(transcribe.Config, None, [f"files=[{tmp_path / name}]", f"model={trained}", "device=cpu"])
        with pytest.raises(AudioError, match=name):
            transcribe.run(config)
    config = load_config(transcribe.Config, None, ["corpus=runs/codes", f"run_dir={tmp_path}", f"model={trained}"])
    with pytest.raises(ConfigError, match=r"hears continuous features, not codes; corpus \(give data.path"):
        transcribe.run(config)
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    (broken / "projector.safetensors").unlink()
    with pytest.raises(ModelError, match="not whole"):
        load_continuous(broken, 192)
    facts = json.loads((trained / "continuous.json").read_text())
    (broken / "continuous.json").write_text(json.dumps(facts | {"encoder_fingerprint": "other"}))
    config = load_config(transcribe.Config, None, [f"files=[{world / '0.wav'}]", f"model={broken}", "device=cpu"])
    with pytest.raises(ConfigError, match="holds other weights than those it was trained on"):
        transcribe.run(config)
    with pytest.raises(ConfigError, match="is not exported; share its folder"):
        export.plan(export.Config(source=str(trained.parent), output=str(tmp_path / "shared")))
    with pytest.raises(ConfigError, match="freeze_llm and lora"):
        configured(world, "x", "freeze_llm=true", "lora.rank=2")
