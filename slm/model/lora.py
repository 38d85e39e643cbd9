"""Low-rank adapters (LoRA, arXiv 2106.09685) on an LLM that was given speech, with the new rows trained too.

Shapes: R rows of length L, D width, V rows of the embedding table, N of them new.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slm.model import further_books, multi_token
from slm.model.freezing import other_towers
from slm.model.modeling import BASE_FILE, ModelError, base_digest, has_tied_head, load_llm
from slm.model.parts import part_of
from slm.vocabulary import SpeechVocabulary


@dataclass
class LoraSettings:
    """Low-rank adapters. The new rows of the embedding (and of an untied head) are trained beside them."""

    rank: int = field(default=16, metadata={"help": "rank of the adapters"})
    alpha: float = field(default=32.0, metadata={"help": "their scale is alpha / rank"})
    dropout: float = field(default=0.0, metadata={"help": "dropout in front of the adapters"})
    target_modules: list[str] | str = field(
        default="all-linear", metadata={"help": "names of the layers that get one, or all-linear"}
    )
    merge: bool = field(default=True, metadata={"help": "write the merged model too, not the adapter alone"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ModelError(f"lora.rank: {self.rank} must be at least 1")


def add_lora(base: PreTrainedModel, vocabulary: SpeechVocabulary, settings: LoraSettings) -> nn.Module:
    """Attaches adapters to a grown model, in place: it is not held twice.

    Args:
        base: The grown base.
        vocabulary: Its new ids, whose rows are trained.
        settings: Rank and the like.

    Returns:
        A `peft.PeftModel` around `base`.

    Raises:
        ModelError: `target_modules` names the output head, whose new rows are trained already.
    """
    from peft import LoraConfig, get_peft_model

    head = base.get_output_embeddings()
    named = {name for name, module in base.named_modules() if module is head}
    asked = [settings.target_modules] if isinstance(settings.target_modules, str) else settings.target_modules
    if any(name == target or name.endswith(f".{target}") for name in named for target in asked):
        raise ModelError(
            f"lora.target_modules: {', '.join(sorted(named))} is the output head, whose new rows are trained already; "
            "leave it out"
        )
    modules = [base.get_input_embeddings()] + ([] if has_tied_head(base) else [base.get_output_embeddings()])
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in base.named_modules()}
    # They learn whole, beside the adapters.
    parts = [name for name in (further_books.NAME, multi_token.NAME) if part_of(base, name) is not None]
    inside = [name for name, m in base.named_modules() if isinstance(m, nn.Linear) and name.split(".")[0] in parts]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        exclude_modules=[*other_towers(base), *inside] or None,
        modules_to_save=parts or None,
        trainable_token_indices={names[id(module)]: vocabulary.new_ids for module in modules},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    keep_tables_whole(model)
    # By itself PEFT adds the whole table to whatever it saves of a grown model, each checkpoint of a Trainer included.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    for name in parts:
        part_of(base, name).float()  # as adapters are, also on a base in half precision
    return model


def merge_lora(base_folder: str | Path, adapter_folder: str | Path, dtype: str = "fp32") -> PreTrainedModel:
    """The base with the adapter's weights folded in: a plain model again."""
    from peft import PeftModel

    base, _, _ = load_llm(str(base_folder), dtype)
    return PeftModel.from_pretrained(base, str(adapter_folder)).merge_and_unload()


def save_adapter(
    model: nn.Module,
    text_tokenizer: PreTrainedTokenizerBase,
    vocabulary: SpeechVocabulary,
    folder: str | Path,
    base: str,
    state_dict: dict[str, Tensor] | None = None,
) -> Path:
    """Writes adapters and new rows, with tokenizer and vocabulary: all that `load_llm` needs beside the base.

    Args:
        model: The `peft.PeftModel`, unwrapped.
        text_tokenizer: Its tokenizer, with the speech tokens added.
        vocabulary: Ids of speech.
        folder: The target.
        base: The model that was grown, by hub name or folder: what the adapter is loaded onto elsewhere.
        state_dict: The weights, where an engine has gathered them.
    """
    local = Path(base).expanduser()
    model.peft_config["default"].base_model_name_or_path = str(local.resolve()) if local.is_dir() else base
    model.save_pretrained(str(folder), state_dict=state_dict)
    text_tokenizer.save_pretrained(folder)
    vocabulary.save(folder)
    known = Path(folder) / BASE_FILE
    known.unlink(missing_ok=True)
    if local.is_dir():
        known.write_text(json.dumps({"digest": base_digest(local)}) + "\n", encoding="utf-8")
    return Path(folder)


def keep_tables_whole(model: nn.Module) -> None:
    """Lets PEFT's trainable token rows stand next to the frozen table, in place.

    PEFT copies the whole table in every forward pass, twice where the head is tied, to write the trained rows into it:
    673 MB of Gemma 3 270M for 12 MB of rows. Here a trained row is looked up, and its logits are written, where it
    belongs. The numbers are the same up to rounding, and so are the adapter's files.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.forward_adapters = MethodType(_with_rows_apart, module)


@contextmanager
def tables_without_their_rows() -> Iterator[None]:
    """Lets `weight` of a table with trained rows be the frozen table, not a new copy that the rows are written into.

    accelerate tells by `weight` whether embedding and head are one table, before FSDP2 shards them. Copies never are,
    and a table that is shared would be sharded twice, which torch refuses.
    """
    from peft.utils.other import TrainableTokensWrapper

    own = TrainableTokensWrapper._getattr_wrapped
    TrainableTokensWrapper._getattr_wrapped = lambda self, name, modules: modules["token_adapter"].base_layer.weight
    try:
        yield
    finally:
        TrainableTokensWrapper._getattr_wrapped = own


def _with_rows_apart(layer: Any, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
    """`TrainableTokensLayer.forward_adapters`: token ids (R, L) -> (R, L, D), or states (..., D) -> logits (..., V)."""
    base = layer.base_layer
    if len(active_adapters) != 1 or layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward_adapters(layer, x, active_adapters, *args, **kwargs)
    (name,) = active_adapters
    rows, ids = layer.trainable_tokens_delta[name], torch.tensor(layer.token_indices[name], device=x.device)
    result = base(x)
    if isinstance(base, nn.Linear):
        # The rows are held in fp32, also where the base is not; PEFT's own path would drop a bias.
        bias = None if base.bias is None else base.bias[ids].to(x.dtype)
        return result.index_copy_(-1, ids, F.linear(x, rows.to(x.dtype), bias).to(result.dtype))
    ids, order = ids.sort()
    place = torch.searchsorted(ids, x.contiguous()).clamp_max(len(ids) - 1)
    own = F.embedding(order[place], rows)
    scale = layer._get_embed_scale()
    own = own if scale is None else own * scale.to(own.dtype)
    return torch.where((ids[place] == x)[..., None], own.to(result.dtype), result)
