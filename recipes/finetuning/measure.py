"""Word errors while an LLM is fine-tuned: the valid loss often turns while they still fall."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes.config import ConfigError
from recipes.finetuning.config import Config
from recipes.finetuning.corpora import used_tasks
from recipes.finetuning.data import Data
from slm.generation import SpeechLM, generate_text
from slm.training.trainer import bare_model


def measured_names(config: Config) -> list[str]:
    """The names of what `training.keep_by` may go by. Raises ConfigError where it names another."""
    tasks = used_tasks(config)
    names = ["loss", *(f"{task.name}_loss" for task in tasks), *(["text_loss"] if config.replay else [])]
    if config.eval_transcripts:
        names += [f"{task.name}_{rate}" for task in tasks if task.answers == "text" for rate in ("wer", "cer")]
    if config.training.keep_by not in names:
        raise ConfigError(
            f"training.keep_by: {config.training.keep_by!r} is not measured; there are {', '.join(names)} (word and "
            "character errors with eval_transcripts above 0)"
        )
    return names


def word_errors(
    config: Config, data: Data, text_tokenizer: PreTrainedTokenizerBase
) -> Callable[[nn.Module], dict[str, float]] | None:
    """A measure of the Trainer's evaluations: `TASK_wer` and `TASK_cer` in per cent; None where none is asked for.

    The first `eval_transcripts` of the valid utterances that the losses are measured on, decoded greedily and compared
    with their texts as the model learns to write them.
    """
    tasks = [task for task in used_tasks(config) if task.answers == "text"]
    if not config.eval_transcripts or not tasks or data.valid is None:
        return None
    utterances = data.valid.utterances[: config.eval_transcripts]
    as_written = get_normaliser("none")

    def measure(model: nn.Module) -> dict[str, float]:
        speech_lm, found = SpeechLM(bare_model(model), text_tokenizer, data.vocabulary), {}
        for task in tasks:
            ids = [u.text if task.reference == "text" else u.columns[task.reference] for u in utterances]
            references = [text_tokenizer.decode(item, skip_special_tokens=True).strip() for item in ids]
            prompts = [data.valid.asked(task, member) for member in range(len(utterances))]
            written = [output.text for output in generate_text(speech_lm, task, prompts)]
            rates = score_pairs(references, written, as_written)
            found |= {f"{task.name}_wer": round(100 * rates.wer, 3), f"{task.name}_cer": round(100 * rates.cer, 3)}
        return found

    return measure
