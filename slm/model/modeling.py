"""A pretrained LLM by name or folder: found, described, loaded, with what it has learnt of speech, and saved whole."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slm.embedded import EMBEDDED, embedded_folder
from slm.model import further_books, multi_token
from slm.model.further_books import add_further_books, further_books_of, load_further_books
from slm.model.multi_token import MultiTokenSettings, load_multi_token_heads, predicted_tokens, set_multi_token_heads
from slm.model.parts import saved_apart
from slm.model.speech_rows import fill_bias, rows_needed
from slm.vocabulary import FILE_NAME, SpeechVocabulary

ADAPTER_FILE = "adapter_config.json"
BASE_FILE = "base.json"  # beside it: what tells the base's weights from others
HUB_TIMEOUT_S, HUB_WAIT_S = 5.0, 1.0  # for an answer, and before a second question
# So long a hub that could not be reached is not asked again: a comparison may hold dozens of names.
HUB_BELIEVED_S = 60.0
_unreached: list[tuple[float, Exception]] = []  # when it could not be reached last, and the error
_BLOCK = 1 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ModelError(ValueError):
    """A model is missing or cannot be used; the message names it, what is missing, and the way out."""


@dataclass
class LLMFacts:
    """What a plan needs to know of a model, read without its weights."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    skeleton: PreTrainedModel  # on the meta device
    vocabulary: SpeechVocabulary | None  # where the model already speaks

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.skeleton.parameters())


def resolve_model(name: str) -> str:
    """Checks that a model can be had: an embedded one, a local folder, the local cache, or the hub.

    Raises:
        ModelError: It cannot; the message says what is missing and how to get it.
        EmbeddedError: An embedded model's files are not there.
    """
    if not name:
        raise ModelError(
            f"model: not set; give {', '.join(EMBEDDED)}, a hub name or a folder, e.g. one that `slm train-lm` wrote "
            "(RUN_DIR/model)"
        )
    if (embedded := embedded_folder(name)) is not None:
        return str(embedded)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists() and not (folder / ADAPTER_FILE).exists():
            inside = (folder / "model" / "config.json").exists()
            meant = str(folder / "model") if inside else "the folder of a saved model (RUN_DIR/model)"
            raise ModelError(f"model {name}: the folder has no config.json; give {meant}")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise ModelError(
                f"model {name}: the folder has a config.json but no weights (model.safetensors); copy it anew"
            )
        return str(folder)
    if folder.is_file():
        raise ModelError(f"model {name}: a file; give the folder of a saved model (RUN_DIR/model)")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model {name}: no such folder, and a hub name is `owner/name`; correct the path, or make it first: "
            "`slm finetune` writes a speech language model as RUN_DIR/model, `slm train-lm` a text LM"
        )
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name
    try:
        _ask_hub(name)
    except Exception as error:  # noqa: BLE001 - every network library raises its own
        missing = "config.json, tokenizer.json, model.safetensors"
        raise ModelError(
            f"model {name}: not a local folder, not in the local Hugging Face cache, and the hub cannot give it "
            f"({type(error).__name__}). Missing: {missing}. Either run `hf download {name}` where there is a "
            "network and give the folder as model=FOLDER, or log in if the model is gated, or train a small one "
            "offline with `slm train-lm`. Where there is never a network, HF_HUB_OFFLINE=1 leaves the asking out"
        ) from error
    return name


def describe_llm(name: str, attention: str = "auto") -> LLMFacts:
    """Configuration, tokenizer and shape of a model, without reading weights.

    Args:
        name: A hub name or a local folder.
        attention: As `load_llm` takes it.

    Raises:
        ModelError: The model cannot be had or is no causal LM with a tokenizer.
    """
    where = resolve_model(name)
    tokenizer = _load_tokenizer(where)
    vocabulary, base = _own_vocabulary(where, tokenizer), _base_of_adapter(where)
    config = _loading(name, AutoConfig.from_pretrained, where if base is None else _resolve_base(where, base))
    if base is not None and vocabulary is not None:
        sizes = config.get_text_config()
        sizes.vocab_size = rows_needed(sizes.vocab_size, vocabulary)
    with torch.device("meta"):
        skeleton = _loading(
            name, AutoModelForCausalLM.from_config, config, attn_implementation=_attention(attention, config)
        )
    return LLMFacts(config, tokenizer, skeleton, vocabulary)


def load_llm(
    name: str, dtype: str = "fp32", attention: str = "auto", random_weights: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, SpeechVocabulary | None]:
    """Loads a causal LM and its tokenizer; of an adapter's folder, its base with the adapter folded in.

    Args:
        name: A hub name or a local folder.
        dtype: "fp32", "bf16" or "fp16": how the weights are held.
        attention: How attention is computed: "sdpa" (fused), "eager" (written out), "flash_attention_2" (of the package
            flash-attn), "auto": fused where the model can.
        random_weights: The architecture and tokenizer alone, with weights drawn as its library draws them (from torch's
            generator): what pretraining gave is the difference.

    Returns:
        The model, its text tokenizer, and its speech vocabulary where it already has one.

    Raises:
        ModelError: The model cannot be had or is no causal LM with a tokenizer.
        FurtherBooksError: Its further books, which a model of books side by side has, are missing or damaged.
        MultiTokenError: Its multi-token heads are damaged.
    """
    where = resolve_model(name)
    tokenizer = _load_tokenizer(where)
    if (base := _base_of_adapter(where)) is not None:
        if random_weights:
            raise ModelError(f"model {name}: an adapter's folder has no weights of its own to draw anew; give {base}")
        vocabulary = _own_vocabulary(where, tokenizer)
        return _with_adapter(where, base, tokenizer, vocabulary, dtype, attention), tokenizer, vocabulary
    config = _loading(name, AutoConfig.from_pretrained, where)
    loading = {"dtype": DTYPES[dtype], "attn_implementation": _attention(attention, config)}
    if random_weights:
        model = _loading(name, AutoModelForCausalLM.from_config, config, **loading)
    else:
        model = _loading(name, AutoModelForCausalLM.from_pretrained, where, **loading)
    if (vocabulary := _own_vocabulary(where, tokenizer)) is not None:
        if random_weights and vocabulary.further_sizes:
            raise ModelError(f"model {name}: its further books cannot be drawn anew; give the text LM that it came of")
        load_further_books(model, vocabulary, where)
        if not random_weights:
            load_multi_token_heads(model, where)
    return model, tokenizer, vocabulary


def _base_of_adapter(where: str) -> str | None:
    """The name of the model that an adapter's folder belongs to; None of any other folder or name."""
    file = Path(where) / ADAPTER_FILE
    return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else None


def _resolve_base(where: str, base: str) -> str:
    try:
        return resolve_model(base)
    except ModelError as error:
        raise ModelError(f"adapter {where}: its base cannot be had: {error}") from error


def _ask_hub(name: str) -> None:
    """Asks for a model, where there is no answer once more, and then not for a minute: the libraries would go on so
    for half a minute.
    """
    if _unreached and time.monotonic() - _unreached[0][0] < HUB_BELIEVED_S:
        raise _unreached[0][1]
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, OfflineModeIsEnabled):  # it will say the same again
        raise
    except Exception:  # noqa: BLE001 - every network library raises its own
        time.sleep(HUB_WAIT_S)
        try:
            HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        except HfHubHTTPError:
            raise
        except Exception as error:  # noqa: BLE001
            _unreached[:] = [(time.monotonic(), error)]
            raise


def base_digest(folder: str | Path) -> str:
    """Tells a base's weights from others: a hash of sixteen places of each file, which takes a moment at any size."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for place in range(16):
                stream.seek(max(0, size - _BLOCK) * place // 15)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def check_base(where: str, base: str) -> None:
    """Raises ModelError where an adapter's base, a folder, holds other weights than those it was trained on."""
    file, folder = Path(where) / BASE_FILE, Path(base).expanduser()
    if file.is_file() and folder.is_dir():
        if json.loads(file.read_text(encoding="utf-8"))["digest"] != base_digest(folder):
            raise ModelError(
                f"adapter {where}: its base {base} holds other weights than those it was trained on, which it would "
                "turn into noise; give it back its base, or train it anew"
            )


def _with_adapter(
    where: str,
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: SpeechVocabulary | None,
    dtype: str,
    attention: str,
) -> PreTrainedModel:
    """An adapter's base, grown by the rows that the adapter holds, with the adapter folded in."""
    from peft import PeftModel

    check_base(where, base)
    model, _, own = load_llm(_resolve_base(where, base), dtype, attention)
    if vocabulary is not None:
        rows = rows_needed(model.get_input_embeddings().weight.shape[0], vocabulary)
        model.resize_token_embeddings(rows, mean_resizing=False)
        fill_bias(model.get_output_embeddings(), own.size if own else vocabulary.first_id, vocabulary.first_id)
        if vocabulary.further_sizes and further_books_of(model) is None:
            add_further_books(model, vocabulary, seed=0)  # in whose place the adapter puts what it has learnt
        if (tokens := predicted_tokens(where)) > 1:
            set_multi_token_heads(model, MultiTokenSettings(tokens))  # the same
    model = _loading(where, PeftModel.from_pretrained, model, where).merge_and_unload()
    model.generation_config = _generation_config(tokenizer, vocabulary)
    return model


def _attention(attention: str, config: PreTrainedConfig) -> str:
    """What transformers is asked for; Gemma 2, Bloom and Mamba have no fused attention."""
    if attention != "auto":
        return attention
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def _load_tokenizer(where: str) -> PreTrainedTokenizerBase:
    return _loading(where, AutoTokenizer.from_pretrained, where)


def _own_vocabulary(where: str, tokenizer: PreTrainedTokenizerBase) -> SpeechVocabulary | None:
    return SpeechVocabulary.load(where, tokenizer) if (Path(where) / FILE_NAME).exists() else None


def _loading(name: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return load(*args, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ModelError(f"model {name}: cannot be loaded as a causal LM with a tokenizer ({reason})") from error


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether embedding and output head are one matrix."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def save_slm(
    model: PreTrainedModel,
    text_tokenizer: PreTrainedTokenizerBase,
    vocabulary: SpeechVocabulary | None,
    folder: str | Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load and that holds all that generation needs.

    Written beside its name and renamed, so the folder is whole or absent.

    Args:
        model: The model, unwrapped.
        text_tokenizer: Its tokenizer, with the speech tokens added.
        vocabulary: Ids of speech; None for a text LM.
        folder: The target; an existing one is replaced.
        state_dict: The weights, where an engine has gathered them from several processes.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.generation_config = _generation_config(text_tokenizer, vocabulary)
    model.config.get_text_config().use_cache = True  # a training with checkpointing turns it off for good
    temporary.mkdir(parents=True)
    with ExitStack() as apart:
        for part in (further_books, multi_token):
            apart.enter_context(saved_apart(model, temporary, part.NAME, part.FILE_NAME))
        model.save_pretrained(temporary, state_dict=state_dict)
    text_tokenizer.save_pretrained(temporary)
    if vocabulary is not None:
        vocabulary.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def _generation_config(
    text_tokenizer: PreTrainedTokenizerBase, vocabulary: SpeechVocabulary | None
) -> GenerationConfig:
    """Ends and padding of a model; a source's sampling settings (temperature, repetition penalty) are not ours."""
    end = vocabulary.end_id if vocabulary else text_tokenizer.eos_token_id
    pad = text_tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=text_tokenizer.bos_token_id,
        eos_token_id=[end, vocabulary.speech_end_id] if vocabulary else [end],
        pad_token_id=end if pad is None else pad,
        do_sample=False,
    )
