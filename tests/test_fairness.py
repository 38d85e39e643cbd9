"""`fairness` of `slm compare`: what a fine-tuning sees, counted by hand, and the steps that make it equal."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from slm_tiny import save_llm, utterances, write_corpus
from test_contrasts import cell
from transformers import AutoModelForCausalLM, MixtralConfig

from eval.report.markdown import results_markdown
from eval.report.tables import budget_table
from eval.results_file import load_results, save_results
from eval.schema import Results
from eval.trainings import Budget
from recipes.commands import compare, finetune
from recipes.comparison.cells import Cell
from recipes.config import ConfigError, load_config
from recipes.finetuning.config import Config as FinetuneConfig
from recipes.finetuning.exposure import Exposure, TrainingCost, equal_amounts, exposure_of, training_cost
from recipes.runs.pipeline import Stage
from recipes.runs.run_folder import RunFolder
from slm.model.lora import LoraSettings
from slm.model.modeling import describe_llm
from slm.training.config import TrainingConfig
from slm.vocabulary import add_speech


def test_flops_of_a_sequence_by_hand() -> None:
    # Three positions see 1 + 2 + 3 = 6 pairs, within a window of 2 1 + 2 + 2 = 5; 12 FLOPs a pair and unit of width.
    cost = TrainingCost(10.0, ((8, None), (8, 2)))
    assert cost.of(np.array([3])).tolist() == [30 + 12 * 8 * 6 + 12 * 8 * 5]
    lengths = np.array([1, 2, 7])
    assert cost.of(lengths).tolist() == [cost.of(np.array([n]))[0] for n in lengths]


@pytest.mark.parametrize(("kind", "passed_is_all"), [("qwen2", True), ("llama", False)])
def test_parameters_that_a_token_passes(tmp_path: Path, kind: str, passed_is_all: bool) -> None:
    facts = describe_llm(str(save_llm(tmp_path, kind)))
    vocabulary = add_speech(facts.tokenizer, [12], n_codebooks=1)
    table = facts.skeleton.get_input_embeddings().weight
    rows = -(-vocabulary.size // 64) * 64 if vocabulary.size > table.shape[0] else table.shape[0]
    every = facts.n_parameters + (rows - table.shape[0]) * 32
    expected = every if passed_is_all else every - table.numel()  # an untied table is only looked up
    cost = training_cost(facts.skeleton, vocabulary, FinetuneConfig())
    assert cost == TrainingCost(6.0 * expected, ((32, None),) * 2)
    # LoRA: rank 2 on q, k, v, o and three of the feed-forward's in two layers; the frozen rest takes no own gradient.
    adapters = 2 * 2 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48))
    trained = adapters + len(vocabulary.new_ids) * 32
    lora = training_cost(facts.skeleton, vocabulary, FinetuneConfig(lora=LoraSettings(rank=2)))
    assert lora.per_token == 6 * trained + 4 * (expected - len(vocabulary.new_ids) * 32)
    # A frozen layer takes no gradient of its own, but the new rows' passes it.
    upper = training_cost(facts.skeleton, vocabulary, FinetuneConfig(training=TrainingConfig(freeze_layers=1)))
    layer = sum(p.numel() for name, p in facts.skeleton.named_parameters() if ".layers.0." in name)
    assert upper.per_token == 6 * expected - 2 * layer
    # Books beside the ids have heads of their own.
    beside = dataclasses.replace(vocabulary, further_sizes=(9, 7))
    assert training_cost(facts.skeleton, beside, FinetuneConfig()).per_token == 6 * (expected + 16 * 32)


def test_of_a_mixture_the_experts_count_that_a_token_is_sent_to(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1}
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads, tie_word_embeddings=False))
    vocabulary = types.SimpleNamespace(size=64, new_ids=[], further_sizes=())
    experts = 4 * 3 * 16 * 24
    others = sum(p.numel() for p in skeleton.parameters()) - experts - 64 * 16
    assert training_cost(skeleton, vocabulary, FinetuneConfig()).per_token == 6 * (others + experts / 4)


def exposure(length: int, steps: int = 0, tokens_per_step: int = 20, n: int = 8) -> Exposure:
    """Samples that are all alike, of which each holds 2 s of speech."""
    tokens = np.full(n, length)
    return Exposure(tokens, np.full(n, 2.0), 100.0 * tokens, tokens_per_step, seed=0, steps=steps)


def test_amounts_of_so_many_steps() -> None:
    # Two samples of 10 tokens fill a step of 20.
    found = exposure(10).amounts(6)
    assert (found.steps, found.tokens, found.audio_seconds, found.flops) == (6, 120, 24.0, 12_000.0)
    assert found.epochs == 12 / 8


@pytest.mark.parametrize(
    ("quantity", "steps", "tokens", "seconds"),
    [
        ("steps", 12, 12 * 20, 12 * 8.0),
        ("tokens", 12, 240, 96.0),  # each step is full at either rate
        ("audio_seconds", 6, 120, 48.0),  # half the tokens hold the same speech
        ("flops", 12, 240, 96.0),
    ],
)
def test_half_the_rate_in_equal_steps_tokens_seconds_and_flops(quantity, steps, tokens, seconds) -> None:
    found = equal_amounts({"25hz": exposure(10, steps=12), "12.5hz": exposure(5)}, "25hz", quantity)
    assert (found["25hz"].steps, found["25hz"].tokens, found["25hz"].audio_seconds) == (12, 240, 48.0)
    assert (found["12.5hz"].steps, found["12.5hz"].tokens, found["12.5hz"].audio_seconds) == (steps, tokens, seconds)


def test_steps_come_as_near_as_whole_ones_can() -> None:
    one = exposure(10)
    assert [one.steps_for("tokens", target) for target in (1, 20, 29, 30, 31, 40, 20 * 500)] == [1, 1, 1, 1, 2, 2, 500]
    with pytest.raises(ValueError, match="fairness: audio_seconds: this training holds none"):
        Exposure(one.tokens, np.zeros(8), one.flops, 20, 0, 1).steps_for("audio_seconds", 5.0)


def config_of(tmp_path: Path, *overrides: str) -> FinetuneConfig:
    save_llm(tmp_path / "llm")
    write_corpus(tmp_path / "codes")
    own = [f"run_dir={tmp_path / 'run'}", f"model={tmp_path / 'llm'}", f"corpus={tmp_path / 'codes'}"]
    own += ["training.tokens_per_step=200", "training.pack_length=64", "device=cpu"]
    return load_config(FinetuneConfig, None, [*own, *overrides])


def test_what_a_training_sees_is_what_its_corpus_holds(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    found, planned = exposure_of(config), finetune.plan(config)
    assert found.tokens.sum() == sum(task["tokens an epoch"] for task in planned["tokens"].values())
    heard = sum(row["duration"] for row in utterances(12))
    assert found.audio_seconds.sum() == pytest.approx(2 * heard)  # once as ASR, once as TTS
    assert found.amounts(planned["steps"]).epochs == pytest.approx(planned["epochs"], abs=0.005)
    # Epochs are turned into steps as the training itself does.
    own = [f"model={config.model}", f"corpus={config.corpus}", "training.tokens_per_step=200", "training.epochs=2"]
    halved = exposure_of(load_config(FinetuneConfig, None, own))
    assert halved.steps == round(2 * found.tokens.sum() / 200)


def test_replayed_text_is_tokens_and_no_speech(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("bin blue at f\n" * 100, encoding="utf-8")
    plain, more = exposure_of(config_of(tmp_path)), exposure_of(config_of(tmp_path / "b", f"replay.path={text}"))
    assert more.audio_seconds.sum() == pytest.approx(plain.audio_seconds.sum())
    assert more.tokens.sum() > plain.tokens.sum() and len(more.audio_seconds) == len(more.tokens)


@dataclass
class Codes:
    """The keys of a stage that makes a tiny corpus."""

    run_dir: str = ""
    rate: float = 12.5
    n: int = 12


@dataclass
class Scores:
    run_dir: str = ""
    source: str = ""


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, int]]:
    """(cell, steps) of each fine-tuning that ran; nothing is trained."""
    ran: list[tuple[str, int]] = []

    def recipe(config_class, act):
        def run(config) -> None:
            folder = RunFolder(config.run_dir)
            folder.check(config)
            if not folder.done(config):
                folder.start(config)
                folder.mark_complete(act(config))

        return types.SimpleNamespace(Config=config_class, run=run, plan=lambda config: {})

    def encode(config) -> None:
        if config.n < 1:
            raise ValueError("there is no speech")
        write_corpus(Path(config.run_dir), config.n, frame_rate=config.rate, fingerprint=f"{config.rate:g}" * 8)

    def finetune_(config) -> dict[str, float]:
        ran.append((Path(config.run_dir).parts[-2], config.training.steps))
        return {"steps": config.training.steps, "flops": 7e9, "cache_bytes_per_s": 2048.0}

    acts = {
        "codes": recipe(Codes, encode),
        "finetune": recipe(FinetuneConfig, finetune_),
        "evaluate": recipe(Scores, lambda c: save_results(Results("", cell(1)), c.run_dir) and None),
    }
    for name, module in acts.items():
        monkeypatch.setitem(sys.modules, f"recipes.commands.{name}", module)
    monkeypatch.setattr(compare, "write_report", lambda results, folder: None)
    monkeypatch.setattr("recipes.runs.run_folder.git_commit", lambda: None)
    return ran


def comparison(tmp_path: Path, fairness: str | None, **more) -> compare.Config:
    if not (tmp_path / "llm").exists():
        save_llm(tmp_path / "llm")
    settings = ["corpus=${codes}", f"model={tmp_path / 'llm'}", "training.steps=6", "training.tokens_per_step=200"]
    stages = [Stage("codes"), Stage("finetune", set=settings), Stage("evaluate", set=["source=${finetune}"])]
    cells = more.pop("cells", [Cell("a", []), Cell("b", ["codes.rate=25", "finetune.training.tokens_per_step=100"])])
    return compare.Config(run_dir=str(tmp_path / "runs"), stages=stages, cells=cells, fairness=fairness, **more)


def test_cells_train_as_long_as_makes_it_equal_and_the_table_says_so(tmp_path: Path, trained) -> None:
    config = comparison(tmp_path, "tokens")
    before = compare.plan(config)["fairness"]["as many tokens as a"]
    assert before["a"].startswith("as configured") and before["b"] == "follows from codes that are not made yet"
    compare.run(config)
    steps = dict(trained)
    assert steps["a"] == 6 and steps["b"] > 6  # steps of half the size
    a, b = load_results(tmp_path / "runs").budgets
    assert (a.cell, a.steps, b.steps, b.equal, b.reference) == ("a", 6, steps["b"], "tokens", "a")
    assert abs(a.tokens - b.tokens) <= 50  # half a step
    after = compare.plan(config)["fairness"]["as many tokens as a"]
    assert after["b"].startswith(f"{b.steps} steps, {b.tokens:,} tokens, ")
    compare.run(config)  # nothing is repeated
    assert len(trained) == 2
    assert "Training budgets" in results_markdown(load_results(tmp_path / "runs"))


def test_what_fine_tunings_cost_stands_beside_the_scores(tmp_path: Path, trained) -> None:
    compare.run(comparison(tmp_path, None))
    found = load_results(tmp_path / "runs")
    told = [(cost.cell, cost.stage, cost.steps, cost.flops, cost.cache_bytes_per_s) for cost in found.costs]
    assert told == [(name, "finetune", 6, 7e9, 2048.0) for name in ("a", "b")]
    assert found.costs[0].wall_s is not None and "| 7e+09 |" in results_markdown(found)
    older = tmp_path / "runs" / "a" / "finetune" / "complete.json"
    older.write_text(older.read_text().replace('"flops"', '"other"'))
    compare.run(comparison(tmp_path, None))
    assert [cost.cell for cost in load_results(tmp_path / "runs").costs] == ["b"]


def test_without_fairness_stages_say_their_steps(tmp_path: Path, trained) -> None:
    compare.run(comparison(tmp_path, None))
    assert dict(trained) == {"a": 6, "b": 6} and load_results(tmp_path / "runs").budgets == []


def test_a_cell_run_later_is_made_equal_to_the_first(tmp_path: Path, trained) -> None:
    config = comparison(tmp_path, "steps", only=["b"])
    compare.run(config)
    assert trained == [("b", 6)]  # a's codes were made for it, and no more of a
    compare.run(comparison(tmp_path, "steps"))
    assert trained == [("b", 6), ("a", 6)]
    assert [budget.cell for budget in load_results(tmp_path / "runs").budgets] == ["a", "b"]


def test_another_corpus_is_another_budget(tmp_path: Path, trained) -> None:
    config = comparison(tmp_path, "audio_seconds")
    compare.run(config)
    kept = json.loads((tmp_path / "runs" / "fairness.json").read_text("utf-8"))
    cells = [Cell("a", []), Cell("b", ["codes.rate=25", "finetune.training.tokens_per_step=100"])]
    other = comparison(tmp_path, "audio_seconds", cells=cells, set=["codes.n=4"], redo="codes")
    compare.run(other)
    again = json.loads((tmp_path / "runs" / "fairness.json").read_text("utf-8"))
    assert kept["cells"]["a"]["corpus"] != again["cells"]["a"]["corpus"] and len(trained) == 4


def test_what_cannot_be_made_equal_is_named(tmp_path: Path, trained) -> None:
    config = comparison(tmp_path, "tokens", cells=[Cell("a", ["codes.n=0"]), Cell("b", [])])
    with pytest.raises(ConfigError, match="fairness: a, whose .* failed: stage codes: there is no speech"):
        compare.run(config)
    config = comparison(tmp_path, "tokens", cells=[Cell("c", []), Cell("d", ["codes.n=0"])])
    with pytest.raises(compare.CellsFailed, match="d: stage codes: there is no speech"):
        compare.run(config)
    assert trained == [("c", 6)]
    stages = [Stage("codes"), Stage("evaluate")]
    config = compare.Config(run_dir=str(tmp_path / "x"), stages=stages, cells=[Cell("a", [])], fairness="tokens")
    with pytest.raises(ConfigError, match="fairness: cell a needs one `finetune` stage of its own, and has none"):
        compare.plan(config)


def test_the_table_has_each_quantity_with_its_share() -> None:
    budgets = [
        Budget("25hz", "tokens", "25hz", 100, 2000, 50.0, 1e12, 1.0),
        Budget("12.5hz", "tokens", "25hz", 100, 2000, 100.0, 5e11, 2.0),
    ]
    table = budget_table(budgets)
    assert table.lines[0] == ["25hz", "100", "2,000", "50", "1e+12", "40.0", "1.00"]
    assert table.lines[1] == ["12.5hz", "100 (1.00x)", "2,000 (1.00x)", "100 (2.00x)", "5e+11 (0.50x)", "20.0", "2.00"]
    assert "as many tokens as that of 25hz" in table.note.replace("sees ", "")


def test_a_cell_without_a_fine_tuning_trains_as_its_stages_say(tmp_path: Path, trained) -> None:
    cells = [Cell("a", []), Cell("b", ["evaluate.source=none"], ["codes", "evaluate"])]
    config = comparison(tmp_path, "tokens", cells=cells)
    assert compare.plan(config)["fairness"]["as many tokens as a"]["b"] == "as configured: it has no `finetune`"
    config.only = ["b"]
    compare.run(config)
    assert trained == []
    config.only = None
    compare.run(config)
    assert trained == [("a", 6)] and [one.cell for one in load_results(tmp_path / "runs").budgets] == ["a"]
    with pytest.raises(ConfigError, match="fairness: cell b needs one `finetune` stage of its own, and has none"):
        compare.plan(comparison(tmp_path, "tokens", cells=cells[::-1]))
