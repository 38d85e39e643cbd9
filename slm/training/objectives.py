"""Which objective a fine-tuning minimises, by what is trained: plain answers, books beside the ids, further tokens."""

from __future__ import annotations

from slm.training.config import TrainingConfig
from slm.training.delay import check_delay, delay_objective
from slm.training.multi_token import check_multi_token, multi_token_objective
from slm.training.trainer import Objective
from slm.vocabulary import SpeechVocabulary


def check_objective(config: TrainingConfig, pattern: str) -> None:
    """Refuses an objective together with what it has not been shown to do.

    Raises:
        TrainingError: An engine that shards, or two objectives that exclude each other.
    """
    check_delay(pattern, config)
    check_multi_token(config, pattern)


def finetuning_objective(
    vocabulary: SpeechVocabulary, config: TrainingConfig, further_weight: float
) -> Objective | None:
    """What `slm.training.trainer.train` minimises; None: the loss of the answers alone.

    Args:
        vocabulary: Of the model that is trained.
        config: Whether it learns further tokens.
        further_weight: Of the books beside book 0, where the pattern is `delay`.
    """
    if config.multi_token is not None:
        return multi_token_objective(vocabulary, config.multi_token)
    return delay_objective(vocabulary, further_weight)
