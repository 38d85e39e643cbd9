"""Growing, LoRA, saving and loading of LLMs, on 2-layer models made in process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel
from slm_tiny import CODES, FINGERPRINT, save_llm, tiny_model, tiny_tokenizer, tokens_of, utterances
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PhiConfig, PhiForCausalLM

from slm.generation import SpeechLM, synthesize_codes, transcribe_codes
from slm.model.lora import LoraSettings, add_lora, merge_lora, save_adapter
from slm.model.modeling import ModelError, describe_llm, has_tied_head, load_llm, resolve_model, save_slm
from slm.model.speech_rows import extend_with_speech
from slm.settings import SynthesizeSettings
from slm.training.config import TrainingConfig
from slm.training.samples import SpeechSamples
from slm.training.text_lm import TextLMConfig, new_text_lm
from slm.training.train import train, trained_weights
from slm.vocabulary import SpeechVocabulary, add_speech


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
def test_new_rows_start_at_the_mean_of_the_text(kind: str) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, len(tokenizer) + 5)
    before = model.get_input_embeddings().weight[: len(tokenizer)].clone()
    text = torch.arange(3, 20)[None]
    logits = model(input_ids=text).logits[..., : len(tokenizer)]
    vocabulary = add_speech(tokenizer, [CODES])
    extend_with_speech(model, vocabulary, seed=1)
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] % 64 == 0 and weight.shape[0] >= vocabulary.size == len(tokenizer)
    assert model.config.vocab_size == weight.shape[0]
    assert (weight[: vocabulary.first_id] == before).all()
    assert has_tied_head(model) == (kind != "llama")
    torch.testing.assert_close(model(input_ids=text).logits[..., : vocabulary.first_id], logits, atol=1e-5, rtol=1e-5)
    for table in (weight, model.get_output_embeddings().weight):
        old, new = table[: vocabulary.first_id], table[vocabulary.first_id :]
        assert ((new - old.mean(0)).std() / old.std()).item() == pytest.approx(0.1, rel=0.2)
        assert len(torch.unique(new, dim=0)) == len(new)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
def test_grown_tables_outlive_the_library_s_initialisation_and_a_save(tmp_path, kind: str) -> None:
    """transformers may draw an untied head anew where `post_init` comes behind a resize (transformers#35141)."""
    model, tokenizer, _ = load_llm(str(save_llm(tmp_path / "llm", kind)))
    text = model.get_output_embeddings().weight[: len(tokenizer)].clone()
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT)
    extend_with_speech(model, vocabulary, seed=0)
    tables = [module.weight.clone() for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    model.post_init()
    loaded = load_llm(str(save_slm(model, tokenizer, vocabulary, tmp_path / "slm")))[0]
    for one in (model, loaded):
        found = [module.weight for module in (one.get_input_embeddings(), one.get_output_embeddings())]
        assert all(torch.equal(a, b) for a, b in zip(found, tables, strict=True))
        assert torch.equal(found[1][: vocabulary.first_id], text)
        assert has_tied_head(one) == (kind != "llama")


def test_a_seed_decides_all_new_rows_also_those_of_text_that_the_table_lacked() -> None:
    """Resizing drew the row of an added text token from the process's own stream, and all new ones follow from it."""
    tables = []
    for stream in (1, 2):
        tokenizer = tiny_tokenizer()
        model = tiny_model("qwen2", len(tokenizer) - 2)
        torch.manual_seed(stream)
        extend_with_speech(model, add_speech(tokenizer, [CODES]), seed=0)
        tables.append(model.get_input_embeddings().weight)
    assert torch.equal(*tables)
    assert tables[0].shape[0] > len(tokenizer)


def test_new_rows_hold_the_codebook_s_vectors() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", len(tokenizer))
    vocabulary = add_speech(tokenizer, [CODES, 8], n_codebooks=2)
    books = [torch.randn(size, 6, generator=torch.Generator().manual_seed(size)) for size in (CODES, 8)]
    books[0][1] = books[0][0] + 0.01
    extend_with_speech(model, vocabulary, seed=1, books=books)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        text = table[: vocabulary.first_id]
        whitened = (table - text.mean(0)) / text.std(0)
        first, second = (whitened[i : i + len(book)] for i, book in zip(vocabulary.offsets, books, strict=True))
        for rows, vectors in ((first, books[0]), (second, books[1])):
            assert rows.std().item() == pytest.approx(1.0, rel=0.25)  # as far apart as words are
            apart = torch.corrcoef(torch.stack([torch.pdist(rows), torch.pdist(vectors)]))[0, 1]
            assert apart > 0.7, "codes near each other in the book are to be near each other in the table"
        assert (first[0] - first[1]).norm() < 0.3 * torch.pdist(first).mean()


def test_a_table_that_is_large_enough_stays() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen2", len(tokenizer) + 30)
    extend_with_speech(model, add_speech(tokenizer, [CODES]), seed=1)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 30 - CODES - 4


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
def test_lora_trains_saves_reloads_and_generates(kind: str, tmp_path) -> None:
    model, tokenizer, own = load_llm(str(save_llm(tmp_path / "llm", kind, chat=kind == "gemma")))
    assert own is None
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT, tokenizer="tiny")
    extend_with_speech(model, vocabulary, seed=0)
    base = save_slm(model, tokenizer, vocabulary, tmp_path / "base")
    peft = add_lora(model, vocabulary, LoraSettings(rank=4))
    samples = SpeechSamples(vocabulary, tokens_of(vocabulary, tokenizer, utterances()), {"asr": 1.0, "tts": 1.0})
    config = TrainingConfig(
        steps=3, tokens_per_step=200, learning_rate=1e-2, warmup_steps=0, eval_steps=0, save_steps=2
    )
    trainer = train(peft, samples, None, config, tmp_path / "checkpoints")
    trained, _ = trained_weights(trainer)
    trained.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    # Rows and adapters, not whole tables.
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 150_000
    ids = torch.from_numpy(samples.example(0, None).input_ids)[None]
    untrained = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        moved = (untrained(input_ids=ids).logits - expected).abs().max()
        attached = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
        assert torch.equal(attached(input_ids=ids).logits, expected)
        merged = merge_lora(base, tmp_path / "adapter")
        save_slm(merged, tokenizer, vocabulary, tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        got = loaded(input_ids=ids).logits
    assert moved > 0.01
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    # New rows moved, text rows did not; an untied head moved too.
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(untrained, name)().weight, getattr(loaded, name)().weight
        assert (before[: vocabulary.first_id] == after[: vocabulary.first_id]).all()
        used = slice(vocabulary.first_id, vocabulary.size)
        assert (before[used] != after[used]).any()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == vocabulary.size
    speech_lm = SpeechLM.load(tmp_path / "model")
    assert speech_lm.vocabulary == vocabulary
    heard = transcribe_codes(speech_lm, [utterances(1)[0]["audio_codes"]])[0]
    said = synthesize_codes(speech_lm, ["lay red"], SynthesizeSettings(min_seconds=1.0))[0]
    assert isinstance(heard.text, str) and said.codes.shape[0] == 1 and said.codes.shape[1] >= 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "phi"])
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_is_the_merged_model(tmp_path, kind, dtype) -> None:
    """A head with a bias too (Phi), and a base held in bf16: PEFT drops the one and cannot multiply the other."""
    if kind == "phi":
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        tokenizer = tiny_tokenizer()
        phi = PhiForCausalLM(PhiConfig(**sizes, vocab_size=len(tokenizer) + 3))
        torch.nn.init.normal_(phi.lm_head.bias)
        phi.save_pretrained(tmp_path / "llm")
        tokenizer.save_pretrained(tmp_path / "llm")
    else:
        save_llm(tmp_path / "llm", kind)
    model, tokenizer, _ = load_llm(str(tmp_path / "llm"), dtype)
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT, tokenizer="tiny")
    extend_with_speech(model, vocabulary, seed=0)
    base = save_slm(model, tokenizer, vocabulary, tmp_path / "base")
    ids = torch.tensor([[5, 40, *vocabulary.new_ids[:6]]])
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        peft = add_lora(model, vocabulary, LoraSettings(rank=4)).eval()
        torch.testing.assert_close(peft(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-5)
        generator = torch.Generator().manual_seed(0)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        trained = peft(input_ids=ids).logits.float()
        save_adapter(peft, tokenizer, vocabulary, tmp_path / "adapter", str(tmp_path / "llm"))
        merged = merge_lora(base, tmp_path / "adapter", dtype).eval()(input_ids=ids).logits.float()
        portable = load_llm(str(tmp_path / "adapter"), dtype)[0].eval()(input_ids=ids).logits.float()
    used = slice(vocabulary.size)  # rows behind it only pad the table
    assert (trained - wanted).abs().max() > 0.05
    for other in (merged, portable):
        error = (other[..., used] - trained[..., used]).norm() / trained[..., used].norm()
        assert error < (1e-4 if dtype == "fp32" else 0.02)


def test_an_adapter_whose_base_has_other_weights_is_refused(tmp_path) -> None:
    model, tokenizer, _ = load_llm(str(save_llm(tmp_path / "llm")))
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT, tokenizer="tiny")
    extend_with_speech(model, vocabulary, seed=0)
    peft = add_lora(model, vocabulary, LoraSettings(rank=4))
    save_adapter(peft, tokenizer, vocabulary, tmp_path / "adapter", str(tmp_path / "llm"))
    load_llm(str(tmp_path / "adapter"))
    tiny_model("qwen2", len(tiny_tokenizer()) + 5, seed=9).save_pretrained(tmp_path / "llm")
    with pytest.raises(ModelError, match="its base .*llm holds other weights"):
        load_llm(str(tmp_path / "adapter"))


def test_adapters_on_the_head_are_refused_by_name(tmp_path) -> None:
    model, tokenizer, _ = load_llm(str(save_llm(tmp_path / "llm", "llama")))
    vocabulary = add_speech(tokenizer, [CODES])
    extend_with_speech(model, vocabulary, seed=0)
    with pytest.raises(ModelError, match="lora.target_modules: lm_head is the output head"):
        add_lora(model, vocabulary, LoraSettings(target_modules=["q_proj", "lm_head"]))


def test_describe_reads_no_weights_and_counts_parameters(tmp_path) -> None:
    folder = save_llm(tmp_path / "llm", "llama")
    facts = describe_llm(str(folder))
    model, _, _ = load_llm(str(folder))
    assert facts.n_parameters == sum(p.numel() for p in model.parameters())
    assert facts.vocabulary is None and next(facts.skeleton.parameters()).device.type == "meta"


def test_missing_models_name_the_way_out(tmp_path, monkeypatch) -> None:
    for name, message in [
        ("", "not set"),
        (str(tmp_path / "none"), "no such folder"),
        (str(tmp_path), "no config.json"),
        ("justaname", "owner/name"),
    ]:
        with pytest.raises(ModelError, match=message):
            resolve_model(name)

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("slm.model.modeling.HfApi.model_info", unreachable)
    with pytest.raises(ModelError, match="Missing: config.json, tokenizer.json, model.safetensors.*slm train-lm"):
        resolve_model("nobody/nothing-of-this-name")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no weights"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_llm(str(tmp_path))


def test_a_new_text_lm_loads_as_a_hub_model_does(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    sizes = TextLMConfig(hidden_size=32, layers=2, heads=2, key_value_heads=1, intermediate_size=48)
    model = new_text_lm(tokenizer, sizes, seed=3)
    again = new_text_lm(tokenizer, sizes, seed=3)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert (one == other).all()
    save_slm(model, tokenizer, None, tmp_path / "lm")
    loaded, loaded_tokenizer, own = load_llm(str(tmp_path / "lm"))
    assert own is None and loaded.generation_config.eos_token_id == [tokenizer.eos_token_id]
    text = "lay  red <|speech|>"
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded_tokenizer.decode(loaded_tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    ids = torch.arange(5)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    for wrong in ({"vocab_size": 100}, {"heads": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TextLMConfig(**wrong)


def test_saved_vocabulary_survives(tmp_path) -> None:
    model, tokenizer, _ = load_llm(str(save_llm(tmp_path / "llm")))
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT)
    extend_with_speech(model, vocabulary, seed=0)
    folder = save_slm(model, tokenizer, vocabulary, tmp_path / "slm")
    loaded = AutoTokenizer.from_pretrained(folder)
    assert SpeechVocabulary.load(folder, loaded) == vocabulary
    ids = vocabulary.encode_text(loaded, "<|speech_0_1|> x")
    assert np.all(ids < vocabulary.first_id)


def test_attention_is_what_the_model_can(tmp_path) -> None:
    """Gemma 2 has no fused attention: it gets eager attention, and the dry run says the same."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    tokenizer = tiny_tokenizer()
    config = Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma2")
    tokenizer.save_pretrained(tmp_path / "gemma2")
    save_llm(tmp_path / "qwen2")
    for name, attention, used in (("gemma2", "auto", "eager"), ("qwen2", "auto", "sdpa"), ("qwen2", "eager", "eager")):
        assert describe_llm(str(tmp_path / name), attention).skeleton.config._attn_implementation == used
        assert load_llm(str(tmp_path / name), attention=attention)[0].config._attn_implementation == used
    for load in (describe_llm, lambda *a: load_llm(a[0], "fp32", a[1])):
        with pytest.raises(ModelError, match="does not support an attention implementation"):
            load(str(tmp_path / "gemma2"), "sdpa")


def test_random_weights_keep_the_architecture_and_nothing_else(tmp_path) -> None:
    folder = str(save_llm(tmp_path / "llm"))
    weights = dict(load_llm(folder)[0].named_parameters())
    draws = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model, _, vocabulary = load_llm(folder, random_weights=True)
        assert vocabulary is None
        draws.append(dict(model.named_parameters()))
    assert {name: p.shape for name, p in draws[0].items()} == {name: p.shape for name, p in weights.items()}
    matrices = [name for name, p in weights.items() if p.ndim > 1]
    assert all(draws[0][name].equal(draws[1][name]) for name in matrices)
    assert not any(draws[0][name].equal(other[name]) for name in matrices for other in (weights, draws[2]))
