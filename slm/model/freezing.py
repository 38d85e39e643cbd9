"""A speech LM whose lower layers stay those of the text LM: after GOAT-TTS (arXiv 2504.12339).

The lower layers and the rows of text ids in the embedding (and in an untied head) keep their weights to the bit, so
what the layers below give for text is what they gave before; the upper layers, the final norm and the new rows learn
speech. What the upper layers then do with text is for text replay to keep. Of a multimodal model the text LM learns
alone.

Shapes: V rows of a table, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slm.model.further_books import further_books_of
from slm.model.modeling import ModelError
from slm.model.multi_token import multi_token_heads_of
from slm.vocabulary import SpeechVocabulary


def decoder_layers(model: PreTrainedModel, key: str = "training.freeze_layers") -> nn.ModuleList:
    """The layers of a causal LM from the lowest on.

    Args:
        model: The causal LM.
        key: The setting that asks for them, for the message.

    Raises:
        ModelError: The model keeps them under a name that is not known.
    """
    decoder = model.get_decoder()
    lists = [getattr(decoder, name, None) for name in ("layers", "h", "blocks")]
    found = next((modules for modules in lists if isinstance(modules, nn.ModuleList)), None)
    if found is None:
        raise ModelError(f"{key}: {type(model).__name__} has no list of layers; leave it out")
    return found


def freeze_lower_layers(model: PreTrainedModel, count: int) -> None:
    """Takes the lowest `count` layers of a model, and what stands before them, out of the training, in place.

    Raises:
        ModelError: It has no layer more than those, so nothing would be left to learn speech.
    """
    layers = decoder_layers(model)
    if count >= len(layers):
        raise ModelError(
            f"training.freeze_layers: {count} of the model's {len(layers)} layers leave none to learn speech; "
            f"give at most {len(layers) - 1}"
        )
    for layer in layers[:count]:
        layer.requires_grad_(False)


def keep_text_rows(model: PreTrainedModel, vocabulary: SpeechVocabulary) -> list[Tensor]:
    """Lets the rows of text ids in the model's tables learn nothing: their gradient is set to 0 on its way.

    Weight decay would move them all the same; the optimizer must take it from the tables that are returned.

    Args:
        model: The grown model, its head tied or not.
        vocabulary: Ids below its `first_id` are the text's.

    Returns:
        The tables (V, D), and an untied head's bias.
    """
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {id(p): p for module in modules if module is not None for p in module.parameters() if p.requires_grad}

    def without_text(gradient: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(gradient[: vocabulary.first_id]), gradient[vocabulary.first_id :]])

    for table in tables.values():
        table.register_hook(without_text)
    return list(tables.values())


def other_towers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers outside the text model and its head: a vision or audio tower of a multimodal one."""
    decoder = model.get_decoder()
    if decoder is None or decoder is model:
        return []
    own = (further_books_of(model), multi_token_heads_of(model))
    tables = (decoder, model.get_input_embeddings(), model.get_output_embeddings(), *own)
    inside = {id(module) for part in tables if part is not None for module in part.modules()}
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
    return [name for name, module in linear if id(module) not in inside]


def freeze_other_towers(model: PreTrainedModel) -> None:
    """Lets a multimodal model's text model and head learn alone: what else it has never runs."""
    if other_towers(model):
        decoder, tables = model.get_decoder(), (model.get_input_embeddings(), model.get_output_embeddings())
        parts = (decoder, *tables, further_books_of(model), multi_token_heads_of(model))
        text = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in text)
