"""What an SLM's training leaves: the model's folder and, of adapters, theirs."""

from __future__ import annotations

import math

from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from recipes.runs.logs import log
from recipes.runs.run_folder import RunFolder
from slm.model.lora import LoraSettings, merge_lora, save_adapter
from slm.model.modeling import save_slm
from slm.training.config import TrainingConfig
from slm.training.train import trained_weights
from slm.training.trainer import SpeechTrainer
from slm.vocabulary import SpeechVocabulary


def save_result(
    folder: RunFolder,
    trainer: SpeechTrainer,
    vocabulary: SpeechVocabulary,
    text_tokenizer: PreTrainedTokenizerBase,
    lora: LoraSettings | None,
    weights: str,
    base: str,
) -> None:
    """Writes `model`, or `adapter` and, where it is to be merged, `model`; call it in every process.

    Args:
        folder: The run's; of adapters it holds the base that they are merged into (`base`).
        trainer: Of the training that is over.
        vocabulary: Of the model.
        text_tokenizer: Of the model.
        lora: The adapters' settings; None where all was trained.
        weights: How the merged weights are held.
        base: The model that was trained, by the name that it has elsewhere.
    """
    trained, state = trained_weights(trainer)
    if not trainer.is_world_process_zero():
        return
    if lora is None:
        save_slm(trained, text_tokenizer, vocabulary, folder.path("model"), state)
        return
    save_adapter(trained, text_tokenizer, vocabulary, folder.path("adapter"), base, state)
    if lora.merge:
        unset_hf_deepspeed_config()  # under ZeRO-3 the base would be shared out over processes that do not load it
        merged = merge_lora(folder.path("base"), folder.path("adapter"), weights)
        save_slm(merged, text_tokenizer, vocabulary, folder.path("model"))


def kept_figures(trainer: SpeechTrainer, training: TrainingConfig, endings: tuple[str, ...]) -> dict[str, float]:
    """The figures of the evaluation whose weights were kept, those whose names have one of the endings."""
    history = [row for row in _evaluations(trainer) if row["step"]]  # weights from before the first step are not kept
    if training.keep == "best":
        history.sort(key=lambda row: row[f"eval_{training.keep_by}"], reverse=True)
    return {key: value for key, value in history[-1].items() if key.endswith(endings)} if history else {}


def warn_of_worse(trainer: SpeechTrainer, kept: dict[str, float], endings: tuple[str, ...]) -> None:
    """Warns of figures, the lower the better, that are higher than before the first step.

    A model that knew the task may come out of a training worse than it went in, under a falling training loss.

    Args:
        trainer: Of the training that is over.
        kept: The figures of the weights that were kept.
        endings: How the figures' names end.
    """
    before = next((row for row in _evaluations(trainer) if not row["step"]), {})
    worse = [name for name, value in kept.items() if name.endswith(endings) and value > before.get(name, math.inf)]
    if worse:
        figures = ", ".join(f"{name} {kept[name]:.4g} (before: {before[name]:.4g})" for name in worse)
        log.warning(
            "on the held-out data the model is worse than before the training: %s; take a lower "
            "training.learning_rate, fewer training.steps or training.keep=best",
            figures,
        )


def _evaluations(trainer: SpeechTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if any(name.startswith("eval_") for name in row)]
