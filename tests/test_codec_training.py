"""The codec training loop through its recipe: what moves, resume after a kill, torn checkpoints, the full disk."""

from __future__ import annotations

import json
import time

import pytest
import torch
from accelerate import Accelerator
from processes import slm, start
from safetensors.torch import load_file

from recipes.commands import train_tokenizer
from recipes.config import ConfigError, dump_config, from_values
from recipes.tokenizer_training.data import make_crops
from recipes.tokenizer_training.networks import new_state
from tokenizer import load_tokenizer
from tokenizer.teacher.recogniser import Recogniser, RecogniserConfig, save_recogniser
from tokenizer.training.checkpoints import save_state
from tokenizer.training.state import TrainState

TINY = {f"{part}_width": 32 for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")} | {
    "latent_dim": 32,
    "head_dim": 16,
    "codebook_sizes": [32, 16, 16],
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    save_recogniser(
        Recogniser.from_scratch(RecogniserConfig(hidden_size=64, encoder_layers=1, decoder_layers=1, window_s=2.0)),
        folder,
    )
    return folder


def config(manifest, run_dir, teacher, **changes):
    values = {
        "run_dir": str(run_dir),
        "data": [{"path": str(manifest)}],
        "model": TINY,
        "teacher": {"name": str(teacher)} if teacher else None,
        "discriminator": {
            "periods": [2],
            "fft_sizes": [256],
            "period_channels": 2,
            "band_channels": 2,
            "start_step": 1,
        },
        "crops": {"crop_s": 0.5, "semantic_only": 0.3},
        "training": {
            "steps": 4,
            "batch_size": 2,
            "save_steps": 2,
            "log_steps": 1,
            "validate_steps": 4,
            "revive_steps": 2,
        },
        "distillation": {"kind": "resynthesis" if teacher else "none"},
        "precision": "fp32",
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) and value is not None else value
    return from_values(train_tokenizer.Config, values)


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_moves_every_part_and_its_folder_loads(make_corpus, tmp_path, teacher):
    settings = config(make_corpus(), tmp_path / "run", teacher)
    torch.manual_seed(settings.seed)
    folder = train_tokenizer.run(settings)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.trained and tokenizer.config.frame_rate == 12.5
    fresh = new_state(settings, Accelerator(cpu=True)).model.state_dict()
    still = {name for name, p in tokenizer.named_parameters() if torch.equal(p, fresh[name])}
    torch.manual_seed(settings.seed)
    assert not still, f"did not move: {still}"
    rows = metrics(tmp_path / "run")
    assert "loss/adversarial" not in rows[0] and "loss/adversarial" in rows[1]
    assert all(row["loss/distillation"] > 0 for row in rows if "loss/mel" in row)
    assert train_tokenizer.run(settings) == folder  # complete: skipped


def test_without_a_teacher_the_auxiliary_decoder_stays(make_corpus, tmp_path):
    settings = config(
        make_corpus(), tmp_path / "run", None, discriminator={"enabled": False}, training={"weight_decay": 0}
    )
    tokenizer = load_tokenizer(train_tokenizer.run(settings))
    torch.manual_seed(settings.seed)
    fresh = new_state(settings, Accelerator(cpu=True)).model
    torch.manual_seed(settings.seed)
    for name, parameter in tokenizer.auxiliary_decoder.named_parameters():
        assert torch.equal(parameter, fresh.auxiliary_decoder.get_parameter(name)), name
    assert "loss/distillation" not in metrics(tmp_path / "run")[0]


def test_killed_and_torn_runs_end_in_the_same_weights(make_corpus, tmp_path, teacher):
    """SIGKILL in mid-run, the newest checkpoint torn on top: the same command ends as the run that was left alone."""
    manifest = make_corpus()
    steps = {"steps": 8, "save_steps": 2}
    whole = load_file(
        train_tokenizer.run(config(manifest, tmp_path / "whole", teacher, training=steps)) / "model.safetensors"
    )
    settings = config(manifest, tmp_path / "cut", teacher, training=steps)
    file = tmp_path / "cut.yaml"
    file.write_text(dump_config(settings))
    # As many threads as here, where the other runs are.
    options = {"log": tmp_path / "log", "threads": torch.get_num_threads()}
    (process,) = start(slm, "train-tokenizer", "--config", str(file), **options)
    deadline = time.time() + 120
    while not (tmp_path / "cut/checkpoints/checkpoint-0000004").exists() and process.is_alive():
        assert time.time() < deadline, "the run made no checkpoint"
        time.sleep(0.02)
    process.kill()
    process.join()
    newest = max((tmp_path / "cut/checkpoints").glob("checkpoint-*"))
    content = (newest / "optimizers.pt").read_bytes()
    (newest / "optimizers.pt").write_bytes(content[: len(content) // 2])
    resumed = load_file(train_tokenizer.run(settings) / "model.safetensors")
    assert (newest.with_name(f"torn-{newest.name}")).exists()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    seen = [row["step"] for row in metrics(tmp_path / "cut") if "loss/mel" in row]
    assert seen == list(range(1, 9))


def test_semantic_only_share_gives_the_semantic_path_no_reconstruction_gradient(make_corpus, tmp_path, teacher):
    settings = config(make_corpus(), tmp_path / "run", teacher, crops={"semantic_only": 1.0})
    crops = make_crops(settings)
    batch = {name: torch.stack([crops[i][name] for i in range(2)]) for name in crops[0]}
    assert batch["semantic_only"].all()
    model = new_state(settings, Accelerator(cpu=True)).model
    model(**batch).audio_values.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.decoder.parameters() if p.requires_grad)
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all(name.startswith("decoder.") for name in moved), moved


def test_quantizer_dropout_and_semantic_share_follow_their_settings(make_corpus, tmp_path, teacher):
    crops = make_crops(config(make_corpus(), tmp_path / "r", teacher, training={"steps": 200}))
    items = [crops[i] for i in range(400)]
    kept = torch.tensor([int(item["n_acoustic_books"]) for item in items])
    assert set(kept.tolist()) == {1, 2}
    # half of the crops draw 1 to K-1 = 2 acoustic books evenly
    assert 0.18 < (kept == 1).float().mean() < 0.32
    assert 0.2 < torch.stack([item["semantic_only"] for item in items]).float().mean() < 0.4
    assert torch.equal(items[7]["input_values"], crops[7]["input_values"])


def test_a_loss_that_is_never_finite_stops_the_run(make_corpus, tmp_path, teacher):
    settings = config(
        make_corpus(), tmp_path / "run", None, weights={"mel": float("inf")}, training={"steps": 9, "save_steps": 100}
    )
    with pytest.raises(FloatingPointError, match="5 steps in a row"):
        train_tokenizer.run(settings)


def test_a_full_disk_names_the_folder_and_keeps_the_checkpoint_before(make_corpus, tmp_path, teacher, monkeypatch):
    import tokenizer.training.checkpoints as state_files

    real = torch.save

    def full(content, path):
        if content["step"] == 4:
            raise OSError(28, "No space left on device")
        real(content, path)

    monkeypatch.setattr(state_files.torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-0000004.*make room"):
        train_tokenizer.run(config(make_corpus(), tmp_path / "run", teacher))
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["checkpoint-0000002"]


@pytest.mark.parametrize("limit", [60_000, 120_000], ids=["weights", "optimizers"])
def test_no_writer_hides_a_failed_write_or_leaves_its_half(tmp_path, limit):
    """A limit on the size of files, which the system's errors come from: each library wraps them its own way."""
    resource = pytest.importorskip("resource")
    model = torch.nn.Linear(128, 160)  # 82 kB, its optimizer twice that
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="checkpoint-0000003.*make room"):
            save_state(TrainState(model, optimizer, step=3), tmp_path, 2, Accelerator(cpu=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_settings_that_cannot_work_are_named(make_corpus, tmp_path, teacher):
    manifest = make_corpus()
    with pytest.raises(ConfigError, match="no preset 'nano-13hz'"):
        train_tokenizer.plan(config(manifest, tmp_path / "a", teacher, preset="nano-13hz"))
    with pytest.raises(ConfigError, match="crop_s=9"):
        train_tokenizer.plan(config(manifest, tmp_path / "a", teacher, crops={"crop_s": 9}))
    for action in (train_tokenizer.plan, train_tokenizer.run):
        with pytest.raises(ConfigError, match="init_from=.*not a tokenizer folder"):
            action(config(manifest, tmp_path / "b", teacher, init_from=str(teacher)))
    plan = train_tokenizer.plan(config(manifest, tmp_path / "a", teacher))
    assert plan["steps"] == 4 and plan["frame rate (Hz)"] == 12.5
