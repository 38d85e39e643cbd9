"""The codec training step at scale: micro-batches, averaged weights, recomputed activations, trackers, exact resume."""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import sys
import types
from datetime import timedelta
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from test_codec_training import TINY, config, metrics
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.commands import train_tokenizer
from recipes.commands.train_tokenizer import Accelerator
from recipes.config import ConfigError
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import make_trackers
from recipes.tokenizer_training.data import make_crops
from recipes.tokenizer_training.networks import new_state
from recipes.tokenizer_training.objective import make_objective
from tokenizer import LMSPTModel, load_tokenizer
from tokenizer.data.crops import StepBatches
from tokenizer.model.configuration import preset_config
from tokenizer.training import loop as training
from tokenizer.training.discriminator import DiscriminatorConfig
from tokenizer.training.state import CodecTrainingConfig
from tokenizer.training.step import train_step

# Weights move from the first step, entries are revived, and Adam does not yet blow rounding up to whole code flips.
MOVING = {
    "batch_size": 8,
    "warmup_steps": 0,
    "learning_rate": 1e-4,
    "usage_decay": 0.3,
    "revive_steps": 2,
    "validate_steps": 100,
}
DAC = {
    "encoder_architecture": "dac",
    "decoder_architecture": "dac",
    "auxiliary_decoder_architecture": "dac",
    "strides": [4, 5, 8, 8],
    "latent_dim": 16,
    "codebook_sizes": [16, 8, 8],
    "semantic_encoder_width": 2,
    "acoustic_encoder_width": 2,
    "decoder_width": 32,
    "auxiliary_decoder_width": 16,
    "head_dim": 8,
    **{f"{part}_depths": [] for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")},
    **{f"{part}_layers": 0 for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")},
}


def moving(manifest, run_dir, teacher, **changes):
    """A teacher that weighs enough to matter, no validation, no tracker but metrics.jsonl."""
    training = {**MOVING, **changes.pop("training", {})}
    weights = {"distillation": 3000.0}
    return config(manifest, run_dir, teacher, training=training, weights=weights, trackers=[], **changes)


def losses_equal(one, other, tolerance=1e-5):
    """All losses of two runs, relative where they are above 1, and ten times looser their gradients' norms.

    The revivals must be the same. Shares are ratios and depend on how the batch is divided.
    """
    rows, others = metrics(one), metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, second in zip(rows, others, strict=True):
        losses = [name for name in row if name.startswith("loss/") and not name.endswith("_share")]
        norms = [name for name in row if name.startswith("gradient_norm") or name == "revived"]
        for names, bound in ((losses, tolerance), (norms, 10 * tolerance)):
            wanted = pytest.approx({name: row[name] for name in names}, abs=bound, rel=bound)
            assert {name: second.get(name) for name in names} == wanted, row["step"]
    assert any(row.get("revived", 0) > 0 for row in rows), "no entry was revived: the test shows too little"
    assert any("loss/adversarial" in row for row in rows)


def weights_equal(one, other, tolerance=5e-4):
    """Within a few steps of Adam: an entry just revived lies on its latent, so that its gradient is rounding alone,
    and Adam makes whole steps of that. An entry revived from another latent would be off by a thousand times more."""
    first, second = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=tolerance, msg=name)


def test_eight_micro_batches_of_one_equal_one_of_eight(make_corpus, tmp_path, tiny_teacher):
    """Crops shorter than the batch's longest, quantizer dropout, semantic-only items, discriminators, revival."""
    manifest = make_corpus()
    train_tokenizer.run(moving(manifest, tmp_path / "whole", tiny_teacher))
    train_tokenizer.run(moving(manifest, tmp_path / "parts", tiny_teacher, training={"accumulation": 8}))
    losses_equal(tmp_path / "whole", tmp_path / "parts")
    weights_equal(tmp_path / "whole", tmp_path / "parts")


def test_every_division_of_a_batch_takes_the_same_crops_in_order():
    audio = types.SimpleNamespace(key=lambda position: position)
    for processes, accumulation in ((1, 1), (1, 4), (4, 1), (2, 2), (3, 4)):
        ranks = [list(StepBatches(audio, range(5, 7), 24, accumulation, r, processes)) for r in range(processes)]
        for step in range(2):
            parts = [part for rank in ranks for part in rank[step * accumulation : (step + 1) * accumulation]]
            assert {len(part) for part in parts} == {24 // processes // accumulation}
            first = (5 + step) * 24
            assert [position for part in parts for position in part] == list(range(first, first + 24))
    with pytest.raises(ValueError, match="batch_size=24.*accumulation=5"):
        StepBatches(audio, range(1), 24, 5, 0, 1)


def test_a_batch_that_cannot_be_divided_is_refused(make_corpus, tmp_path, monkeypatch):
    manifest = make_corpus()
    with pytest.raises(ConfigError, match="batch_size=2: must divide by accumulation=3"):
        config(manifest, tmp_path / "run", None, training={"accumulation": 3})
    monkeypatch.setenv("WORLD_SIZE", "4")
    for start in (train_tokenizer.plan, train_tokenizer.run):
        with pytest.raises(ConfigError, match=r"batch_size=2 .* times 4 process"):
            start(config(manifest, tmp_path / "run", None))


def test_averaged_weights_are_saved_validated_and_resumed(make_corpus, tmp_path, tiny_teacher):
    manifest = make_corpus()
    make_corpus(2, "valid")
    training = {**MOVING, "ema_decay": 0.5, "save_steps": 1, "keep_checkpoints": 9, "validate_steps": 4}
    run = tmp_path / "run"
    folder = train_tokenizer.run(config(manifest, run, tiny_teacher, training=training))
    states = [load_file(run / f"checkpoints/checkpoint-000000{step}/model.safetensors") for step in range(1, 5)]
    name = "decoder.head.linear.weight"
    mean = states[0][name]
    for state in states[1:]:
        mean = 0.5 * mean + 0.5 * state[name]
    saved = load_tokenizer(folder).state_dict()
    torch.testing.assert_close(saved[name], mean)
    assert not torch.equal(saved[name], states[-1][name])
    assert torch.equal(saved["quantizer.books.0.usage"], states[-1]["quantizer.books.0.usage"])
    last = json.loads((run / "complete.json").read_text())["summary"]
    assert metrics(run)[-1]["valid/mel"] == pytest.approx(last["valid/mel"], abs=1e-4)

    # from the second step on, by another division of the batch: nothing of the state is missing in the checkpoint
    cut = tmp_path / "cut"
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("checkpoint-*3", "checkpoint-*4", "complete.json", "model"))
    config_file = cut / "config.yaml"
    config_file.write_text(config_file.read_text().replace(str(run), str(cut)))
    resumed = train_tokenizer.run(config(manifest, cut, tiny_teacher, training=training))
    again = load_tokenizer(resumed).state_dict()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert [row["step"] for row in metrics(cut)] == [row["step"] for row in metrics(run)]
    for part in ("model", "discriminator", "ema"):
        ends = [load_file(d / f"checkpoints/checkpoint-0000004/{part}.safetensors") for d in (run, cut)]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), part


def test_a_run_may_go_on_with_another_accumulation_but_not_with_another_batch(make_corpus, tmp_path):
    manifest = make_corpus()
    run = tmp_path / "run"
    train_tokenizer.run(config(manifest, run, None, discriminator={"enabled": False}, training={"batch_size": 4}))
    (run / "complete.json").unlink()
    other = config(manifest, run, None, discriminator={"enabled": False}, training={"batch_size": 4, "accumulation": 2})
    train_tokenizer.run(other)
    with pytest.raises(ConfigError, match="training.batch_size: was 4, is now 8"):
        train_tokenizer.run(config(manifest, run, None, discriminator={"enabled": False}, training={"batch_size": 8}))


def same_weights(one, other, step, parts=("model", "discriminator")):
    """Whether two runs' checkpoints of a step are equal bit for bit."""
    pairs = [
        [load_file(d / f"checkpoints/checkpoint-{step:07d}/{part}.safetensors") for d in (one, other)] for part in parts
    ]
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def test_operational_keys_are_free_when_a_run_goes_on(make_corpus, tmp_path, tiny_teacher):
    """Steps between checkpoints, lines and validations, checkpoints kept, workers: the weights stay bit for bit."""
    manifest = make_corpus()
    make_corpus(2, "valid")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_tokenizer.run(moving(manifest, whole, tiny_teacher))
    train_tokenizer.run(moving(manifest, cut, tiny_teacher, training={"steps": 2, "schedule_steps": 4}))
    free = {
        "schedule_steps": 4,
        "save_steps": 1,
        "keep_checkpoints": 1,
        "log_steps": 2,
        "validate_steps": 3,
        "num_workers": 1,
    }
    train_tokenizer.run(moving(manifest, cut, tiny_teacher, training=free))
    assert same_weights(whole, cut, 4)
    assert [path.name for path in (cut / "checkpoints").iterdir()] == ["checkpoint-0000004"]
    assert [row["step"] for row in metrics(cut) if "loss/mel" in row] == [1, 2, 4]
    assert [row["step"] for row in metrics(cut) if "valid/mel" in row] == [3]


def test_an_extended_run_equals_the_run_begun_with_its_length(make_corpus, tmp_path, tiny_teacher):
    """A complete run goes on, both optimizers with it, and where the schedule is one function of the step, whole and
    extended run are the same bit for bit. With a schedule that ends with the run, the rates from there on are."""
    manifest = make_corpus()
    for name, schedule in (("same", {"schedule_steps": 8}), ("own", {"final_lr_share": 0.1})):
        whole, grown = tmp_path / f"{name}-whole", tmp_path / f"{name}-grown"
        train_tokenizer.run(moving(manifest, whole, tiny_teacher, training={"steps": 6, **schedule}))
        first = train_tokenizer.run(moving(manifest, grown, tiny_teacher, training={"steps": 3, **schedule}))
        short = load_file(first / "model.safetensors")
        longer = moving(manifest, grown, tiny_teacher, training={"steps": 6, **schedule})
        last = train_tokenizer.run(longer)
        assert json.loads((grown / "complete.json").read_text())["summary"]["steps"] == 6
        assert not torch.equal(
            short["decoder.head.linear.weight"], load_file(last / "model.safetensors")["decoder.head.linear.weight"]
        )
        rows = [[row["learning_rate"] for row in metrics(run)] for run in (whole, grown)]
        assert rows[0][3:] == rows[1][3:] and len(rows[0]) == 6
        assert same_weights(whole, grown, 6) == (name == "same")
        assert (rows[0] == rows[1]) == (name == "same")
        assert train_tokenizer.run(longer) == last  # complete again: skipped
    with pytest.raises(ConfigError, match="training.steps: was 6, is now 5, .* reached step 6"):
        train_tokenizer.run(moving(manifest, grown, tiny_teacher, training={"steps": 5, **schedule}))


def test_an_extended_run_may_stay_at_its_floor(make_corpus, tmp_path):
    run, manifest = tmp_path / "run", make_corpus()

    def settings(**training):
        return config(manifest, run, None, discriminator={"enabled": False}, training={"warmup_steps": 0, **training})

    train_tokenizer.run(settings(steps=2))
    train_tokenizer.run(settings(steps=5, schedule_steps=2))
    assert [row["learning_rate"] for row in metrics(run) if "loss/mel" in row][2:] == pytest.approx([2e-5] * 3)


@pytest.mark.parametrize("sizes", [TINY, DAC], ids=["nano", "dac"])
def test_recomputed_activations_give_the_same_gradients(sizes):
    torch.manual_seed(0)
    model = LMSPTModel(preset_config("nano-12.5hz", **sizes)).train()
    values = torch.randn(2, 1, 6400) * 0.1
    mask = torch.arange(6400) < torch.tensor([[6400], [4000]])

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        output = model(values, mask)
        (output.audio_values.square().sum() + output.auxiliary_values.square().sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    kept = gradients()
    calls = []
    model.activation_checkpointing_enable({"use_reentrant": False})
    part = model.semantic_encoder
    real = part._gradient_checkpointing_func
    part._gradient_checkpointing_func = lambda *arguments: calls.append(1) or real(*arguments)
    recomputed = gradients()
    assert calls, "nothing was checkpointed"
    assert kept.keys() == recomputed.keys()
    for name in kept:
        torch.testing.assert_close(recomputed[name], kept[name], msg=name)


def test_a_step_draws_from_no_global_generator(make_corpus, tmp_path, tiny_teacher):
    """Why a checkpoint needs no generator's state."""
    settings = moving(make_corpus(), tmp_path / "run", tiny_teacher)
    accelerator = Accelerator(cpu=True)
    state = new_state(settings, accelerator)
    objective = make_objective(settings, accelerator)
    crops = make_crops(settings)
    batch = {name: torch.stack([crops[i][name] for i in range(2)]) for name in crops[0]}
    before = torch.get_rng_state()
    for state.step in range(2):  # the second is adversarial
        assert train_step(state, [batch], objective, settings.training, accelerator)["gradient_norm"] > 0
    assert torch.equal(torch.get_rng_state(), before)


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers read off it, and outputs as long as what is in the input."""

    LONG_AS_INPUT = ("nonzero", "bincount", "masked_select", "_unique2", "unique_consecutive")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        picks = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        picked = picks and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if picked or name in ("_local_scalar_dense", "equal", *self.LONG_AS_INPUT):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_its_device_a_few_times_only(make_corpus, tmp_path, tiny_teacher, monkeypatch):
    """Four figures: losses and norm of each network. It does not read its own input again, nor count book by book."""
    settings = moving(make_corpus(), tmp_path / "run", tiny_teacher, training={"ema_decay": 0.9, "accumulation": 2})
    accelerator = Accelerator(cpu=True)
    state = new_state(settings, accelerator)
    objective, crops = make_objective(settings, accelerator), make_crops(settings)
    state.step = 1  # adversarial, and no entry is revived
    batches = list(islice(training._micro_batches(state, crops, settings.training, accelerator), 2))
    assert any(min(batch["lengths"]) < batch["input_values"].shape[-1] for batch in batches), "no crop is short"
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(1) or tolist(t))
    with Waits() as waits:
        train_step(state, batches, objective, settings.training, accelerator)
    assert len(lists) == 2  # the losses of each network
    # the norms of each; and AveragedModel reads its counter twice, which lies on the CPU
    assert waits.seen == ["_local_scalar_dense"] * (2 + 2)


@pytest.mark.parametrize(
    ("device", "deterministic", "wanted"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_convolutions_are_tuned_to_the_crops_for_a_step_on_a_gpu_alone(
    make_corpus, tmp_path, monkeypatch, device, deterministic, wanted
):
    make_corpus(2, "valid")
    settings = moving(make_corpus(), tmp_path / "run", None, training={"steps": 1, "validate_steps": 1})
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    found, real, one_shape = {}, training.train_step, training.one_shape
    monkeypatch.setattr(training, "one_shape", lambda _: one_shape(torch.device(device)))

    def noted(name, function):
        return lambda *a: found.update({name: torch.backends.cudnn.benchmark}) or function(*a)

    monkeypatch.setattr(training, "train_step", noted("step", real))
    monkeypatch.setattr(training, "validate", noted("validation", training.validate))
    train_tokenizer.run(settings)
    assert found == {"step": wanted, "validation": False}
    with pytest.raises(KeyError), one_shape(torch.device(device)):
        raise KeyError
    assert not torch.backends.cudnn.benchmark


def test_weights_and_biases_gets_the_figures_and_its_absence_is_named(make_corpus, tmp_path, monkeypatch):
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        with pytest.raises(ConfigError, match="pip install wandb"):
            make_trackers(["tensorboard", "wandb"], None)
    logged, started = [], []
    run = types.SimpleNamespace(log=lambda values, step=None, **_: logged.append((step, values)), finish=lambda: None)
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **kwargs: started.append(kwargs) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = config(
        make_corpus(), tmp_path / "w", None, discriminator={"enabled": False}, trackers=["wandb"], training={"steps": 2}
    )
    train_tokenizer.run(settings)
    assert [step for step, _ in logged] == [1, 2] and all("loss/mel" in values for _, values in logged)
    assert started[0]["project"] == "lmspt-slm" and started[0]["name"].endswith("w") and started[0]["resume"] == "allow"
    assert not (tmp_path / "w/tensorboard").exists()

    folder = RunFolder(tmp_path / "w")

    def identity() -> str:
        return make_trackers(["wandb"], folder)[1].init_kwargs["id"]

    assert identity() == started[0]["id"]  # a resumed run goes on there
    folder.set_aside()
    assert identity() != started[0]["id"]  # one started over does not


def test_several_processes_start_over_only_when_the_folder_is_set_aside(tmp_path, monkeypatch):
    """Else one of them would find the old run complete, and leave the others waiting."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen, waits = [], []
    monkeypatch.setattr("accelerate.PartialState.wait_for_everyone", lambda self: seen.append(run.exists()))
    monkeypatch.setattr("accelerate.PartialState.__init__", lambda self, cpu, timeout: waits.append(timeout))
    for rank, left in (("1", True), ("0", False)):
        monkeypatch.setenv("RANK", rank)
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        RunFolder(run).set_aside((), 100.0)
        assert seen.pop() is left and waits.pop() == timedelta(seconds=100)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_has_the_losses_of_an_eager_one(make_corpus, tmp_path, tiny_teacher):
    """Slow: the compiler takes a minute or two."""
    manifest = make_corpus()
    train_tokenizer.run(moving(manifest, tmp_path / "eager", tiny_teacher))
    train_tokenizer.run(moving(manifest, tmp_path / "compiled", tiny_teacher, training={"compile": True}))
    losses_equal(tmp_path / "eager", tmp_path / "compiled", tolerance=1e-3)


def test_a_loss_scale_that_overflows_is_lowered_and_nothing_moves(make_corpus, tmp_path, tiny_teacher, monkeypatch):
    """fp16's scaler on CPU, where arithmetic stays fp32: two optimizers share it, each unscaled once."""
    settings = moving(make_corpus(), tmp_path / "run", tiny_teacher)
    plain, scaled = Accelerator(cpu=True), Accelerator(cpu=True)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, backoff_factor=2.0**-100)
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16" if self is scaled else "no"))
    scaled.native_amp = True
    monkeypatch.setattr(scaled, "autocast", plain.autocast)
    crops = make_crops(settings)
    batch = {name: torch.stack([crops[i][name] for i in range(2)]) for name in crops[0]}
    figures = {}
    for name, accelerator in (("plain", plain), ("scaled", scaled)):
        torch.manual_seed(0)
        state = new_state(settings, accelerator)
        objective = make_objective(settings, accelerator)
        objective.distillation_weight = 3000.0
        if name == "scaled":
            before = {key: value.clone() for key, value in state.model.state_dict().items()}
            skipped = train_step(state, [batch], objective, settings.training, accelerator)
            assert skipped["overflow"] == 1.0 and "gradient_norm" not in skipped
            assert all(torch.equal(value, before[key]) for key, value in state.model.state_dict().items())
            assert accelerator.scaler.get_scale() < 2.0**124
        state.step = 1  # where the discriminators begin
        figures[name] = [train_step(state, [batch], objective, settings.training, accelerator) for _ in range(2)]
    for one, other in zip(figures["plain"], figures["scaled"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU")
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_runs_stay_near_fp32_and_resume_with_their_loss_scale(
    make_corpus, tmp_path, tiny_teacher, precision
):
    manifest = make_corpus()
    training = {"steps": 60, "save_steps": 30, "keep_checkpoints": 9, "learning_rate": 1e-5}
    for name in ("fp32", precision):
        train_tokenizer.run(moving(manifest, tmp_path / name, tiny_teacher, precision=name, training=training))
    ends = [metrics(tmp_path / name)[-1]["loss/mel"] for name in ("fp32", precision)]
    assert ends[1] == pytest.approx(ends[0], rel=0.02)
    state = torch.load(tmp_path / precision / "checkpoints/checkpoint-0000030/optimizers.pt", weights_only=True)
    assert ("scaler" in state) == (precision == "fp16")
    if precision == "fp16":
        assert state["scaler"]["scale"] > 1


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"accumulation=0.*ema_decay=1.0: must lie in \[0, 1\)"):
        CodecTrainingConfig(accumulation=0, ema_decay=1.0)
    with pytest.raises(ValueError, match=r"gradient_clip=0: must be above 0; a large value such as 1e9 turns it off"):
        CodecTrainingConfig(gradient_clip=0)
    wrong = {
        "gradient_clip": -1.0, "usage_decay": 1.0, "learning_rate": 0.0, "betas": (0.8, 1.0), "weight_decay": -0.1,
        "final_lr_share": 1.5, "revive_until": -0.5,
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"training: {name}=[^;]*(must|each)"):
            CodecTrainingConfig(**{name: value})
    CodecTrainingConfig(gradient_clip=1e9, usage_decay=0, final_lr_share=1, revive_until=0)
    with pytest.raises(ValueError, match="enabled=false"):
        DiscriminatorConfig(periods=[], fft_sizes=[])
    DiscriminatorConfig(enabled=False, periods=[], fft_sizes=[])
    wrong = {"periods": [2, 0], "fft_sizes": [510], "period_channels": 0, "band_channels": 0, "start_step": -1}
    for name, value in [*wrong.items(), ("fft_sizes", [512, 8]), ("fft_sizes", [-512])]:
        with pytest.raises(ValueError, match=f"discriminator: {name}="):
            DiscriminatorConfig(**{name: value})
