"""Which objective a fine-tuning minimises: answers alone, or with books beside the ids, further tokens, heads that
align, or a codebook that speech and text share.
"""

from __future__ import annotations

from collections.abc import Sequence

from slm.tasks import Task
from slm.training.alignment.trainer import alignment_objective, check_alignment
from slm.training.config import TrainingConfig, TrainingError
from slm.training.delay import check_delay, delay_objective
from slm.training.multi_token import check_multi_token, multi_token_objective
from slm.training.shared_codebook.trainer import check_shared_codebook, shared_codebook_objective
from slm.training.trainer import Objective
from slm.vocabulary import SpeechVocabulary


def check_objective(config: TrainingConfig, pattern: str, tasks: Sequence[Task]) -> None:
    """Refuses an objective together with what it has not been shown to do.

    Args:
        config: Of the training.
        pattern: Of codes in the sequence.
        tasks: What is trained.

    Raises:
        TrainingError: An engine that shards, or two objectives that exclude each other.
    """
    check_delay(pattern, config)
    check_multi_token(config, pattern)
    check_alignment(config.alignment, pattern, any(task.says_its_prompt for task in tasks))
    check_shared_codebook(config, pattern, {task.name for task in tasks})
    if config.alignment is not None and config.multi_token is not None:
        raise TrainingError("training.alignment: not with training.multi_token; each has an objective of its own")


def finetuning_objective(
    vocabulary: SpeechVocabulary, config: TrainingConfig, further_weight: float
) -> Objective | None:
    """What `slm.training.train.train` minimises; None: the loss of the answers alone.

    Args:
        vocabulary: Of the model that is trained.
        config: Whether it learns further tokens, attention that follows the text, or units of speech and text.
        further_weight: Of the books beside book 0, where the pattern has such.
    """
    if config.multi_token is not None:
        return multi_token_objective(vocabulary, config.multi_token)
    if config.shared_codebook is not None:
        return shared_codebook_objective(vocabulary, config.shared_codebook)
    return delay_objective(vocabulary, further_weight) or alignment_objective(config.alignment)
