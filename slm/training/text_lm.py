"""A small text LM from scratch, for where no pretrained one can be had: byte-level BPE and a Qwen2-shaped model.

The folder it is saved in loads as any hub model does, so it takes the same path from there on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"


@dataclass
class TextLMConfig:
    """Sizes of a small Qwen2-shaped LM."""

    vocab_size: int = field(default=512, metadata={"help": "BPE entries, of which 256 are bytes and 3 are special"})
    hidden_size: int = field(default=256, metadata={"help": "width"})
    layers: int = field(default=6, metadata={"help": "transformer layers"})
    heads: int = field(default=4, metadata={"help": "attention heads"})
    key_value_heads: int = field(default=4, metadata={"help": "key and value heads (fewer: grouped-query attention)"})
    intermediate_size: int = field(default=768, metadata={"help": "width of the feed-forward layers"})
    max_length: int = field(default=4096, metadata={"help": "longest sequence"})
    rope_theta: float = field(default=10_000.0, metadata={"help": "base of the rotary positions"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout on attention weights"})

    def __post_init__(self) -> None:
        if self.vocab_size < 256 + 3:
            raise ValueError(f"vocab_size: {self.vocab_size} is below the 259 that bytes and special tokens take")
        if self.hidden_size % self.heads or self.heads % self.key_value_heads:
            raise ValueError(
                f"heads: hidden_size {self.hidden_size} must be a multiple of heads {self.heads}, "
                f"and that of key_value_heads {self.key_value_heads}"
            )


def build_text_tokenizer(sentences: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE whose decoding gives back every text exactly, spaces included.

    Args:
        sentences: Training texts.
        vocab_size: Entries at most; a small corpus may not fill them.

    Returns:
        A tokenizer with pad, bos and eos; calling it puts bos in front.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_text_lm(tokenizer: PreTrainedTokenizerFast, config: TextLMConfig, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2-shaped LM with random weights drawn from `seed`, its head tied to the embedding."""
    shape = Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attention_dropout=config.attention_dropout,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(shape)
