"""The loss without logits of the whole batch equals that of whole logits: value, gradients, every kind of head."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from slm_tiny import tiny_model
from test_sequences import speech_samples
from torch import nn
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from slm.model.lora import keep_tables_whole
from slm.training import answer_loss
from slm.training.answer_loss import AnswerLoss
from slm.training.config import TrainingConfig
from slm.training.train import train

ROWS = 96
IGNORED = -100


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, ROWS, (3, 20), generator=generator)
    labels = ids.where(torch.rand(ids.shape, generator=generator) < 0.4, torch.tensor(IGNORED))
    weights = torch.rand(ids.shape, generator=generator) * (labels != IGNORED)
    return {"input_ids": ids, "position_ids": torch.arange(20).expand(3, 20), "labels": labels, "weights": weights}


def of_whole_logits(model, input_ids, position_ids, labels, weights) -> torch.Tensor:
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    losses = F.cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORED)
    return (losses * weights[:, 1:].flatten()).sum()


def untied() -> torch.nn.Module:
    model = tiny_model("qwen2", ROWS)
    model.config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    return model


def with_bias() -> torch.nn.Module:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    model.lm_head.bias = torch.nn.Parameter(torch.randn(ROWS))
    return model


def lora(model: torch.nn.Module, *tables: str) -> torch.nn.Module:
    rows = list(range(ROWS - 20, ROWS))
    torch.manual_seed(2)
    adapted = get_peft_model(
        model,
        LoraConfig(
            target_modules="all-linear", trainable_token_indices=dict.fromkeys(tables, rows), task_type="CAUSAL_LM"
        ),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def with_tables_whole(model: torch.nn.Module) -> torch.nn.Module:
    keep_tables_whole(model)
    return model


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def with_soft_cap() -> torch.nn.Module:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=16, vocab_size=ROWS, final_logit_softcapping=2.0))
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def with_scaling() -> torch.nn.Module:
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SMALL, vocab_size=ROWS, logits_scaling=0.2))


def with_factor() -> torch.nn.Module:
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(**SMALL, vocab_size=ROWS, logit_scale=0.0625))
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


MODELS = {
    "tied": lambda: tiny_model("qwen2", ROWS),
    "untied": untied,
    "with a bias": with_bias,
    "LoRA, tied": lambda: lora(tiny_model("qwen2", ROWS), "embed_tokens"),
    "LoRA, untied": lambda: lora(untied(), "embed_tokens", "lm_head"),
    "LoRA, rows apart": lambda: with_tables_whole(lora(tiny_model("qwen2", ROWS), "embed_tokens")),
    "soft cap": with_soft_cap,
    "LoRA, soft cap": lambda: with_tables_whole(lora(with_soft_cap(), "embed_tokens")),
    "scaling": with_scaling,
    "factor": with_factor,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("elements", [5 * ROWS, 1 << 25], ids=["chunks of 5", "one chunk"])
def test_it_equals_the_loss_of_whole_logits(monkeypatch, name, elements) -> None:
    monkeypatch.setattr(answer_loss, "CHUNK_ELEMENTS", elements)
    model = MODELS[name]().eval()
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    loss = AnswerLoss(bare)
    assert loss.fits(model)
    found = []
    for function in (lambda **b: of_whole_logits(model, **b), lambda **b: loss(model, **b, ignored=IGNORED)):
        model.zero_grad()
        value = function(**batch())
        (3 * value).backward()  # what comes from above counts too
        found.append((value, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (wanted, gradients), (got, chunked) = found
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == chunked.keys() and len(gradients) > 3
    for key, gradient in gradients.items():
        torch.testing.assert_close(chunked[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_no_more_logits_are_alive_than_a_chunks(monkeypatch) -> None:
    monkeypatch.setattr(answer_loss, "CHUNK_ELEMENTS", 4 * ROWS)
    monkeypatch.setattr(answer_loss, "TOKEN_MULTIPLE", 1)
    model = tiny_model("qwen2", ROWS)
    loss, sizes = AnswerLoss(model), []
    real = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *a, **k: sizes.append(len(logits)) or real(logits, *a, **k))
    loss(model, **batch(), ignored=IGNORED).backward()
    n_answers = int((batch()["labels"][:, 1:] != IGNORED).sum())
    assert max(sizes) == 4 and sum(sizes) == n_answers < 57


def test_numbers_of_answer_tokens_share_shapes_and_fill_has_no_loss(monkeypatch) -> None:
    """oneDNN keeps a kernel for each shape: with one for every number of tokens a training grew by gigabytes."""
    model, sizes = tiny_model("qwen2", ROWS), set()
    loss, real = AnswerLoss(model), F.cross_entropy
    for n in (1, 2, answer_loss.TOKEN_MULTIPLE - 1, answer_loss.TOKEN_MULTIPLE):
        labels = torch.full((57,), IGNORED).index_fill(0, torch.arange(n), 3).view(3, 19)
        one = batch() | {"labels": F.pad(labels, (1, 0), value=IGNORED), "weights": torch.ones(3, 20)}
        wanted = of_whole_logits(model, **one)
        with monkeypatch.context() as patch:
            patch.setattr(F, "cross_entropy", lambda logits, *a, **k: sizes.add(len(logits)) or real(logits, *a, **k))
            torch.testing.assert_close(loss(model, **one, ignored=IGNORED), wanted)
            weights = one.pop("weights")[0, 0]
            alone = loss.log_probabilities(model, **one, ignored=IGNORED)
        assert alone.shape == (n,)
        torch.testing.assert_close(-weights * alone.sum(), wanted)
    assert sizes == {answer_loss.TOKEN_MULTIPLE}


def test_the_head_is_itself_again_also_after_an_error() -> None:
    model = tiny_model("qwen2", ROWS)
    loss = AnswerLoss(model)
    with pytest.raises((IndexError, RuntimeError)):
        loss(model, **batch() | {"labels": torch.full((3, 20), ROWS + 7)}, ignored=IGNORED)
    assert "forward" not in model.lm_head.__dict__
    assert model(input_ids=batch()["input_ids"]).logits.shape == (3, 20, ROWS)


@pytest.mark.parametrize("name", ["tied", "with a bias", "LoRA, rows apart", "soft cap"])
def test_with_autocast_it_is_that_of_whole_logits_up_to_bf16s_rounding(name) -> None:
    model = MODELS[name]().eval()
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = []
    for function in (of_whole_logits, lambda m, **b: AnswerLoss(bare)(m, **b, ignored=IGNORED)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = function(model, **batch())
        value.backward()
        found.append((value, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-2, atol=1e-2)
    for wanted, got in zip(found[0][1], found[1][1], strict=True):
        assert got.dtype == wanted.dtype and (got - wanted).norm() <= 0.03 * wanted.norm()


@pytest.mark.parametrize("kind", ["tied", "LoRA, tied"])
def test_without_gradients_none_are_made(monkeypatch, kind: str) -> None:
    """The value is the same, no weight gets a gradient, and none is computed: it would be as large as the table."""
    model = MODELS[kind]().eval()
    for head in (answer_loss.Head, answer_loss.LinearHead):
        monkeypatch.setattr(head, "gradients", lambda *a: pytest.fail("a gradient was made"))
    with torch.no_grad():
        value = AnswerLoss(model)(model, **batch(), ignored=IGNORED)
    assert not value.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(value, of_whole_logits(model, **batch()).detach())


def test_a_model_that_changes_its_logits_in_a_way_of_its_own_is_refused() -> None:
    model = with_soft_cap()
    loss = AnswerLoss(model)
    assert loss.fits(model)
    model.config.final_logit_softcapping = 3.0  # not what the configuration said
    assert not loss.fits(model)
    model.lm_head = nn.Bilinear(32, 32, ROWS)  # no head that one hidden state goes through
    assert AnswerLoss.of(model, model) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: lora(tiny_model("qwen2", ROWS), "embed_tokens"),
        lambda: lora(tiny_model("gemma", ROWS), "embed_tokens"),
        lambda: lora(untied(), "embed_tokens", "lm_head"),
    ],
    ids=["tied", "scaled embedding", "untied"],
)
def test_rows_beside_the_table_give_what_pefts_copies_of_it_give(make) -> None:
    """Values and gradients, with rows that have moved; and no copy of the table."""
    found = []
    for light in (False, True):
        model = make()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    parameter.add_(0.3)
        if light:
            keep_tables_whole(model)
        logits = model(input_ids=batch()["input_ids"]).logits
        logits.square().mean().backward()
        found.append((logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        if light:
            for layer in model.modules():
                if hasattr(layer, "get_merged_weights"):
                    layer.get_merged_weights = None  # would be called for a copy
            model(input_ids=batch()["input_ids"])
    (logits, gradients), (light_logits, light_gradients) = found
    torch.testing.assert_close(light_logits, logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == light_gradients.keys() and any("delta" in name for name in gradients)
    for key, gradient in gradients.items():
        torch.testing.assert_close(light_gradients[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("change", ["no head to be had", "scaled behind the head"])
def test_a_training_falls_back_to_whole_logits(tmp_path, monkeypatch, change) -> None:
    samples = speech_samples()
    config = TrainingConfig(steps=2, tokens_per_step=260, pack_length=64, eval_steps=0, log_steps=1, warmup_steps=1)
    losses = []
    for whole in (False, True):
        model = tiny_model("qwen2", samples.vocabulary.size)
        if whole and change == "no head to be had":
            monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
        elif whole:
            monkeypatch.setattr(AnswerLoss, "fits", lambda self, model: False)
        trainer = train(model, samples, None, config, tmp_path / str(whole))
        assert (trainer.answer_loss is None) == whole
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
