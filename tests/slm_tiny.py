"""Tiny models, tokenizers and coded corpora for the tests of slm/, all made in process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from slm.corpus import CodedCorpusWriter, CorpusMetadata
from slm.tasks.registry import UtteranceTokens
from slm.training.text_lm import build_text_tokenizer
from slm.vocabulary import SpeechVocabulary

SENTENCES = [
    "bin blue at f two now",
    "lay red by a nine please",
    "set white in z four soon",
    "place green with k one again",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}"
)
CODES = 12
FINGERPRINT = "f" * 64


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerBase:
    tokenizer = build_text_tokenizer(SENTENCES, 300)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(kind: str, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A 2-layer model shaped as Qwen2 (tied head), Llama (untied head) or Gemma (tied, scaled embedding)."""
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 48, "max_position_embeddings": 256}
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).eval()
    if kind == "gemma":
        return GemmaForCausalLM(GemmaConfig(**sizes, head_dim=16, tie_word_embeddings=True)).eval()
    return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).eval()


def save_llm(folder: Path, kind: str = "qwen2", chat: bool = False) -> Path:
    tokenizer = tiny_tokenizer(chat)
    # The table has a few rows more than the tokenizer has ids, as many hub models do.
    tiny_model(kind, len(tokenizer) + 5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def translation(text: str) -> str:
    """A text in another language, so to speak: its words the other way round."""
    return " ".join(reversed(text.split()))


def utterances(n: int = 12, books: int = 2, seed: int = 0) -> list[dict]:
    """Rows whose codes follow from their text, so that there is something to learn; the text's translation too."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        text = SENTENCES[i % len(SENTENCES)]
        book0 = np.array([(ord(c) + j) % CODES for j, c in enumerate(text)])[: 8 + i % 5]
        codes = np.stack([book0, *(rng.integers(0, CODES, len(book0)) for _ in range(books - 1))])
        rows.append({"id": f"u{i}", "text": text, "speaker": "s", "duration": len(book0) / 12.5, "audio_codes": codes})
        rows[-1]["columns"] = {"translation": translation(text)}
    return rows


def metadata(**changes: object) -> CorpusMetadata:
    values = {"fingerprint": FINGERPRINT, "codebook_sizes": [CODES, CODES], "frame_rate": 12.5, "sampling_rate": 16000}
    return CorpusMetadata(**(values | {"tokenizer": "tiny"} | changes))


def write_corpus(folder: Path, n: int = 12, **changes: object) -> Path:
    writer = CodedCorpusWriter(folder, metadata(**changes))
    rows = utterances(n)
    writer.write_shard("train", 0, 2, rows[::2])
    writer.write_shard("train", 1, 2, rows[1::2])
    writer.write_shard("valid", 0, 1, utterances(4, seed=1))
    writer.write_shard("test", 0, 1, utterances(4, seed=2))
    writer.finish()
    return folder


def tokens_of(
    vocabulary: SpeechVocabulary, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> list[UtteranceTokens]:
    """What training samples are made of."""
    return [UtteranceTokens(row["audio_codes"], vocabulary.encode_text(tokenizer, row["text"])) for row in rows]


# Of models of any kind, whose caches differ.
SIZES = {"vocab_size": 60, "hidden_size": 32, "pad_token_id": 0}
DEEP = SIZES | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}


def opinionated(kind: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model with weights so large that its choices are clear, the same at each call, and its (V,) legal ids."""
    torch.manual_seed(0)
    model = kind(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    legal = torch.ones(SIZES["vocab_size"], dtype=torch.bool)
    legal[:3] = False
    return model.eval(), legal
