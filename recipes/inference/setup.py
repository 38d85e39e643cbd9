"""What ``slm transcribe`` and ``slm synthesize`` check and load alike: their input, model and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from recipes.config import ConfigError, Problems
from recipes.inference.acoustic import AcousticVoice
from recipes.inference.tasks import check_language, check_marks, resolve_task, task_name
from recipes.runs.logs import log
from recipes.runs.machine import resolve_device
from recipes.runs.run_folder import RunFolder
from slm.corpus import CodedCorpus
from slm.embedded import DEFAULT_SPEECH_LM, SPEECH_LMS
from slm.model.modeling import DTYPES, ModelError, describe_llm
from slm.tasks import Task, get_task
from slm.tasks.registry import Modality
from slm.vocabulary import SpeechVocabulary
from tokenizer import load_tokenizer
from tokenizer.data.manifest import read_sources
from tokenizer.data.utterances import Utterance


def check_inputs(config: Any, *own: str) -> None:
    """Exactly one input, known weights, and a place for what is more than one file. Raises ValueError.

    `own` are the names of the keys for inputs that are neither a data source nor a corpus.
    """
    given = [key for key in (*own, "data", "corpus") if getattr(config, key)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of {', '.join(own)}, data, corpus")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit: {config.limit} must be at least 1, or null for all")
    if config.weights not in DTYPES:
        raise ValueError(f"weights: {config.weights!r} is not one of {', '.join(DTYPES)}")
    if given and given[0] not in own and not config.run_dir:
        raise ValueError(f"run_dir: needed with {given[0]}; that is where the predictions go")


def require_input(config: Any, own: Any, name: str) -> None:
    """Raises ConfigError where nothing was given to work on."""
    if not (own or config.data or config.corpus):
        raise ConfigError(f"nothing to do: give {name}, data.path=... or corpus=...")


def corpus_rows(config: Any, vocabulary: SpeechVocabulary) -> Iterator[dict[str, Any]]:
    """A coded corpus's rows, refused if its codes are not the model's. Raises CorpusError."""
    corpus = CodedCorpus.open(config.corpus)
    corpus.check_fingerprint(vocabulary.fingerprint)
    for number, row in enumerate(corpus.rows(config.split)):
        if config.limit is not None and number >= config.limit:
            return
        yield row


def source_utterances(config: Any) -> list[Utterance]:
    """A data source's split, with the columns that the task reads, where it has them.

    Raises:
        DataError: it cannot be read, is empty, or has two of one id.
    """
    columns = list(dict.fromkeys([*config.data.columns, *get_task(task_name(config)).columns]))
    return read_sources([replace(config.data, columns=columns)], config.split)[: config.limit]


@dataclass
class Setup:
    """The parts that are needed beside the model's weights, checked.

    `tokenizer` is None where codes are there, `acoustic` where no stage fills the books that the model does not speak.
    """

    task: Task
    device: str
    vocabulary: SpeechVocabulary
    tokenizer: Any
    acoustic: AcousticVoice | None = None

    @property
    def decoder(self) -> Any:
        """The codec that makes sound of the answers."""
        return self.tokenizer if self.acoustic is None else self.acoustic.decoder


def check_setup(
    problems: Problems, config: Any, answers: Modality, tokenizer_of: Callable[..., Any] | None
) -> Setup | None:
    """Notes what is wrong with the folder, the task, the device, the model, its speech tokenizer or the inputs."""
    if config.run_dir:
        problems.attempt(RunFolder(config.run_dir).check, config)
    task = problems.attempt(resolve_task, task_name(config), answers)
    device = problems.attempt(resolve_device, config.device)
    vocabulary = problems.attempt(model_vocabulary, config)
    if task is not None and vocabulary is not None:
        problems.attempt(check_marks, task, vocabulary, config.model)
        problems.attempt(check_language, config, task, vocabulary)
    tokenizer = None
    if vocabulary is not None and tokenizer_of is not None:
        tokenizer = problems.attempt(tokenizer_of, config, vocabulary, device or "cpu")
    if config.data and task is not None:
        problems.attempt(source_utterances, config)
    if config.corpus and vocabulary is not None:
        problems.attempt(lambda: next(corpus_rows(config, vocabulary), None))
    elif config.corpus:
        problems.attempt(CodedCorpus.open, config.corpus)
    return Setup(task, device, vocabulary, tokenizer) if task and device and vocabulary else None


def speech_tokenizer(config: Any, vocabulary: SpeechVocabulary, device: str) -> Any:
    """The speech tokenizer the model was trained with. Raises VocabularyError where it is another one."""
    name = config.tokenizer or vocabulary.tokenizer
    if not name:
        raise ConfigError("tokenizer: the model does not name its speech tokenizer; give tokenizer=...")
    tokenizer = load_tokenizer(name, device)
    vocabulary.check_fingerprint(tokenizer.fingerprint(vocabulary.precision), f"tokenizer {name}")
    return tokenizer


def tell_default_model(config: Any) -> None:
    """Says which model answers where it is the one that nobody need name."""
    if config.model == DEFAULT_SPEECH_LM:
        log.info("model: %s, which comes with the package (your own: model=RUN_DIR/model)", config.model)


def model_vocabulary(config: Any) -> SpeechVocabulary:
    """The speech vocabulary of the model folder, checked without reading weights. Raises ModelError."""
    if not config.model:
        raise ConfigError(f"model: not set; give {', '.join(SPEECH_LMS)} or one that `slm finetune` made")
    facts = describe_llm(config.model)
    if facts.vocabulary is None:
        raise ModelError(f"model {config.model}: a text LM that has not learnt speech; make it one with `slm finetune`")
    return facts.vocabulary


def decoding_tokenizer(config: Any, vocabulary: SpeechVocabulary, device: str) -> Any:
    """The speech tokenizer the model was trained with. Raises ConfigError where nothing makes sound of its codes."""
    tokenizer = speech_tokenizer(config, vocabulary, device)
    if not tokenizer.decode_paths and not getattr(config, "acoustic", ""):  # which may bring a decoder along
        raise ConfigError(
            f"the model speaks the codes of {config.tokenizer or vocabulary.tokenizer}, which has no decoder to make "
            "sound of them: it can transcribe, not synthesize. Fine-tune a model on codes of a tokenizer with a "
            "decoder, or give them one: `slm train-acoustic decoder_corpus=...`, then acoustic=... --voice"
        )
    return tokenizer
