"""Judges: recognisers that read waveforms, so that synthesised speech can be scored by what is heard in it.

A judge is a named choice (:class:`JudgeConfig`); :func:`load_judge` gives a :class:`Judge` whose ``identity`` (weights,
decoding, beams) stands in the protocol of every score. Four kinds:

- ``seq2seq``: any ``AutoModelForSpeechSeq2Seq`` (Whisper, Moonshine, our recogniser folder), read with ``generate``;
- ``ctc-head``: our recogniser folder through the CTC head on its encoder (``ctc_head.safetensors``), greedy;
- ``ctc``: any ``AutoModelForCTC`` (wav2vec2, HuBERT), greedy;
- ``pocketsphinx``: a classical recogniser that carries its own model (extra ``eval``). It had no part in any training.

Shapes: B clips, S samples, M mel bins, T encoder frames, D width, V vocabulary, L text tokens.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.audio import resample, split_at_quiet

__all__ = ["CTC_HEAD_FILE", "Judge", "JudgeConfig", "JudgeError", "check_judge", "load_judge"]

CTC_HEAD_FILE = "ctc_head.safetensors"
_FRAME_S = 0.02  # one frame of a Whisper encoder
_SHORTEST_S = 0.1  # shorter clips are padded: convolutional front ends need some input
_OPEN_WINDOW_S = 30.0  # pieces for models that have no window of their own
_Reader = Callable[[list[np.ndarray]], list[str]]


class JudgeError(ValueError):
    """The judge cannot be had as configured; the message says what is missing and the way out."""


@dataclass
class JudgeConfig:
    """Which recogniser reads the audio, and how."""

    name: str = field(
        default="pocketsphinx",
        metadata={"help": "folder or hub name of a transformers ASR model, our recogniser's folder, or 'pocketsphinx'"},
    )
    label: str | None = field(default=None, metadata={"help": "name in tables; default: taken from `name`"})
    decoding: str = field(
        default="auto",
        metadata={"help": "'attention' (generate), 'ctc' (greedy), or 'auto': what the model was made for"},
    )
    num_beams: int = field(default=1, metadata={"help": "beams of 'attention' decoding"})
    batch_size: int = field(default=8, metadata={"help": "clips read at a time"})
    revision: str | None = field(
        default=None, metadata={"help": "commit or tag of a hub model; pin it to compare scores"}
    )
    language: str | None = field(
        default=None, metadata={"help": "language code for a multilingual Whisper, such as 'en'"}
    )
    max_tokens_per_second: float = field(
        default=25.0,
        metadata={"help": "bound on the text tokens heard in a second: stops a decoder that repeats itself"},
    )

    def __post_init__(self) -> None:
        if self.decoding not in ("auto", "attention", "ctc"):
            raise JudgeError(f"judge {self.name!r}: decoding must be auto, attention or ctc, not {self.decoding!r}")
        for key in ("num_beams", "batch_size", "max_tokens_per_second"):
            if getattr(self, key) <= 0:
                raise JudgeError(f"judge {self.name!r}: {key} must be positive, not {getattr(self, key)}")

    def display_name(self) -> str:
        """The name in tables; of ``runs/recogniser/model`` that is "recogniser"."""
        if self.label:
            return self.label
        parts = [part for part in Path(self.name).parts if part not in ("model", "/", ".")]
        return parts[-1] if Path(self.name).is_dir() and parts else self.name


@dataclass
class Judge:
    """A loaded recogniser.

    Attributes:
        identity: JSON-able facts that pin what was heard: weights, decoding, beams.
        sampling_rate: the rate the model listens at; other audio is resampled.
        window_s: longest piece read at once; longer audio is cut in its quietest places.
    """

    identity: dict[str, Any]
    sampling_rate: int
    window_s: float
    batch_size: int
    _read: _Reader

    @property
    def name(self) -> str:
        return str(self.identity["name"])

    def transcribe(self, audios: Sequence[np.ndarray], sampling_rate: int) -> list[str]:
        """Read waveforms.

        Args:
            audios: mono waveforms (S,), of any length.
            sampling_rate: their rate in Hz.

        Returns:
            One text for each waveform, as the model writes it (normalise before scoring).

        Raises:
            ValueError: a waveform is empty, not one-dimensional, or holds NaN or infinity.
        """
        pieces: list[tuple[int, np.ndarray]] = []
        for position, audio in enumerate(audios):
            audio = np.asarray(audio)
            if audio.ndim != 1 or audio.size == 0 or not np.isfinite(audio).all():
                raise ValueError(
                    f"waveform {position} (shape {audio.shape}) must be one-dimensional, not empty and finite"
                )
            audio = resample(audio, sampling_rate, self.sampling_rate)
            shortest = math.ceil(_SHORTEST_S * self.sampling_rate)
            for piece in split_at_quiet(audio, self.sampling_rate, self.window_s):
                pieces.append((position, np.pad(piece, (0, max(0, shortest - len(piece))))))
        # Clips of one length together: less padding, and one bound on the answer's length fits them all.
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i][1]))
        texts = [""] * len(pieces)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, text in zip(batch, self._read([pieces[i][1] for i in batch]), strict=True):
                texts[i] = text
        found: list[list[str]] = [[] for _ in audios]
        for (position, _), text in zip(pieces, texts, strict=True):
            found[position].append(text.strip())
        return [" ".join(filter(None, parts)) for parts in found]


def _kind(config: JudgeConfig) -> tuple[str, Any]:
    """Which of the four kinds a configuration means, and the transformers config (None for pocketsphinx)."""
    if config.name == "pocketsphinx":
        try:
            metadata.version("pocketsphinx")
        except metadata.PackageNotFoundError:
            raise JudgeError(
                "judge 'pocketsphinx' is not installed: pip install 'lmspt-slm[eval]', or name another judge"
            ) from None
        return "pocketsphinx", None
    from transformers import AutoConfig, AutoModelForCTC, AutoModelForSpeechSeq2Seq

    try:
        model_config = AutoConfig.from_pretrained(config.name, revision=config.revision)
    except (OSError, ValueError) as error:
        raise JudgeError(
            f"judge {config.name!r} is neither a local model folder nor a hub model that can be reached ({error}). "
            "Train one with `slm train-teacher`, copy a model folder here, or use name=pocketsphinx"
        ) from error
    seq2seq = type(model_config) in AutoModelForSpeechSeq2Seq._model_mapping
    ctc = type(model_config) in AutoModelForCTC._model_mapping
    if config.decoding == "ctc" and seq2seq and not ctc:
        if not (Path(config.name) / CTC_HEAD_FILE).is_file():
            raise JudgeError(f"judge {config.name!r} has no {CTC_HEAD_FILE}: use decoding=attention")
        return "ctc-head", model_config
    if ctc and config.decoding in ("ctc", "auto"):
        return "ctc", model_config
    if seq2seq and config.decoding in ("attention", "auto"):
        return "seq2seq", model_config
    raise JudgeError(
        f"judge {config.name!r} ({model_config.model_type}) cannot be read with decoding={config.decoding}: it is "
        f"{'a CTC model' if ctc else 'a sequence-to-sequence model' if seq2seq else 'not a speech recogniser'}"
    )


def _weights_sha256(folder: Path) -> str:
    """Digest of a local folder's weights, settings and tokenizer: what decides which text comes out."""
    files = [
        path for ending in ("*.safetensors", "pytorch_model*.bin", "*.json", "*.txt") for path in folder.glob(ending)
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_judge(config: JudgeConfig) -> dict[str, Any]:
    """The judge's identity, without loading its weights into memory.

    Raises:
        JudgeError: the judge is not there, or cannot be read in the configured way.
    """
    kind, model_config = _kind(config)
    beams = config.num_beams if kind == "seq2seq" else 1
    if config.num_beams != beams:
        raise JudgeError(f"judge {config.name!r}: num_beams={config.num_beams} needs decoding=attention, not {kind}")
    identity: dict[str, Any] = {"name": config.display_name(), "kind": kind}
    if kind == "pocketsphinx":
        if config.decoding != "auto":
            raise JudgeError(f"judge 'pocketsphinx': decoding={config.decoding} is not for it; leave it at auto")
        return identity | {"revision": f"pocketsphinx {metadata.version('pocketsphinx')}", "decoding": "default"}
    if Path(config.name).is_dir():
        identity["weights_sha256"] = _weights_sha256(Path(config.name))
    else:
        identity["revision"] = getattr(model_config, "_commit_hash", None) or config.revision
    identity |= {"decoding": "attention" if kind == "seq2seq" else "ctc", "num_beams": beams}
    if kind == "seq2seq":
        identity |= {"language": config.language, "max_tokens_per_second": config.max_tokens_per_second}
    return identity


def load_judge(config: JudgeConfig, device: str = "cpu") -> Judge:
    """Load a judge onto a device.

    Raises:
        JudgeError: the judge is not there, or cannot be read in the configured way.
    """
    identity = check_judge(config)
    if identity["kind"] == "pocketsphinx":
        return Judge(identity, 16_000, _OPEN_WINDOW_S, config.batch_size, _pocketsphinx_reader())
    kind, model_config = _kind(config)
    from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": config.name, "revision": config.revision}
    auto = AutoModelForCTC if kind == "ctc" else AutoModelForSpeechSeq2Seq
    try:
        model = auto.from_pretrained(**source).eval().to(device)
        extractor = AutoFeatureExtractor.from_pretrained(**source)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except OSError as error:
        raise JudgeError(f"judge {config.name!r} is incomplete: {error}") from error
    whisper = model_config.model_type == "whisper"
    window_s = model_config.max_source_positions * _FRAME_S if whisper else _OPEN_WINDOW_S
    rate = extractor.sampling_rate

    def features(clips: list[np.ndarray], attention_mask: bool = True) -> dict[str, torch.Tensor]:
        # A Whisper encoder takes exactly its window; others take the longest clip of the batch.
        length = {"padding": "max_length", "max_length": round(window_s * rate)} if whisper else {"padding": True}
        batch = extractor(clips, sampling_rate=rate, return_tensors="pt", **length)
        return {key: value.to(device) for key, value in batch.items() if attention_mask or key != "attention_mask"}

    if kind == "ctc":
        read = _ctc_reader(model, features, tokenizer, extractor)
    elif kind == "ctc-head":
        read = _ctc_head_reader(model, features, tokenizer, Path(config.name))
    else:
        read = _seq2seq_reader(model, features, tokenizer, config, rate, whisper)
    return Judge(identity, rate, window_s, config.batch_size, read)


@contextmanager
def _quiet_whisper() -> Iterator[None]:
    """Drops one notice: Whisper's own generate hands the library's two kinds of settings, and is warned for it."""
    logger = logging.getLogger("transformers.generation.utils")

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Passing `generation_config` together with")

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _seq2seq_reader(
    model: Any,
    features: Callable[..., dict[str, torch.Tensor]],
    tokenizer: Any,
    config: JudgeConfig,
    rate: int,
    whisper: bool,
) -> _Reader:
    settings = model.generation_config
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        # Whisper's configuration suppresses ids of its own vocabulary by default; a smaller one does not have them.
        kept = [i for i in getattr(settings, key, None) or [] if 0 <= i < model.config.vocab_size]
        setattr(settings, key, kept or None)
    settings.max_length = None
    extra: dict[str, Any] = {"return_timestamps": False} if whisper else {}
    if config.language is not None:
        extra |= {"language": config.language, "task": "transcribe"}
    # Room for the prompt: start, language, task, no timestamps.
    room = max(1, (getattr(model.config, "max_target_positions", None) or 448) - 8)
    eos, special = settings.eos_token_id, set(tokenizer.all_special_ids)

    def bound(n_samples: int) -> int:
        return min(room, 10 + math.ceil(config.max_tokens_per_second * n_samples / rate))

    def read(clips: list[np.ndarray]) -> list[str]:
        bounds = [bound(len(clip)) for clip in clips]
        # Beams depend on the bound itself, which must then not depend on the company a clip is in.
        longest = max(bounds) if config.num_beams == 1 else bound(round(_OPEN_WINDOW_S * rate))
        # Whisper's generate adds its prompt to `max_length`, and warns about its own default beside `max_new_tokens`.
        limit = {"max_length" if whisper else "max_new_tokens": longest}
        with torch.inference_mode(), _quiet_whisper():
            output = model.generate(
                **features(clips, attention_mask=not whisper),
                num_beams=config.num_beams,
                do_sample=False,
                **limit,
                **extra,
            )  # (B, L)
        texts = []
        for ids, length in zip(output.tolist(), bounds, strict=True):
            # The batch ran under its longest clip's bound; each answer is cut to its own, so batching changes nothing.
            start = next((i for i, token in enumerate(ids) if token not in special), len(ids))
            answer = ids[start : start + length]
            if eos in answer:
                answer = answer[: answer.index(eos)]
            texts.append(_to_text(tokenizer, answer))
        return texts

    return read


def _to_text(tokenizer: Any, ids: list[int], **options: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False, **options)


def _collapse(ids: list[int], blank: int) -> list[int]:
    """Greedy CTC: repeats become one, then blanks go."""
    return [token for i, token in enumerate(ids) if token != blank and (i == 0 or token != ids[i - 1])]


def _ctc_head_reader(
    model: Any, features: Callable[..., dict[str, torch.Tensor]], tokenizer: Any, folder: Path
) -> _Reader:
    from safetensors.torch import load_file

    head = {key: value.to(model.device) for key, value in load_file(folder / CTC_HEAD_FILE).items()}
    if head.keys() != {"weight", "bias"} or head["weight"].shape[1] != model.config.d_model:
        raise JudgeError(f"{folder / CTC_HEAD_FILE} must hold `weight` (V, {model.config.d_model}) and `bias` (V,)")
    blank = tokenizer.pad_token_id

    def read(clips: list[np.ndarray]) -> list[str]:
        with torch.inference_mode():
            hidden = model.get_encoder()(features(clips)["input_features"]).last_hidden_state  # (B, T, D)
            best = torch.nn.functional.linear(hidden, head["weight"], head["bias"]).argmax(-1)  # (B, T)
        # The whole window is read: a head trained on padded clips may place a last letter in the silence after the end.
        return [_to_text(tokenizer, _collapse(ids, blank)) for ids in best.tolist()]

    return read


def _ctc_reader(
    model: Any, features: Callable[..., dict[str, torch.Tensor]], tokenizer: Any, extractor: Any
) -> _Reader:
    from transformers import Wav2Vec2CTCTokenizer

    blank = model.config.pad_token_id if model.config.pad_token_id is not None else tokenizer.pad_token_id
    # This tokenizer would merge repeats again, and write "helo" for "hel<blank>lo".
    options = {"group_tokens": False} if isinstance(tokenizer, Wav2Vec2CTCTokenizer) else {}

    def read(clips: list[np.ndarray]) -> list[str]:
        # Models trained without attention mask (group norm over time) hear the padding: they read one by one.
        groups = [clips] if extractor.return_attention_mask else [[clip] for clip in clips]
        texts = []
        for group in groups:
            with torch.inference_mode():
                best = model(**features(group)).logits.argmax(-1)  # (B, T)
            longest = max(len(clip) for clip in group)
            for ids, clip in zip(best.tolist(), group, strict=True):
                valid = math.ceil(len(ids) * len(clip) / longest)
                texts.append(_to_text(tokenizer, _collapse(ids[:valid], blank), **options))
        return texts

    return read


def _pocketsphinx_reader() -> _Reader:
    from pocketsphinx import Decoder

    decoder = Decoder(samprate=16_000, loglevel="FATAL")

    def read(clips: list[np.ndarray]) -> list[str]:
        texts = []
        for clip in clips:
            # It was trained on speech at full level and takes 16-bit samples: a quiet recording is brought up.
            peak = float(np.abs(clip).max())
            samples = (clip * (0.9 * 32767 / peak if peak > 0 else 0.0)).astype(np.int16)
            # Its front end carries state on: without this a text depends on what was read before.
            decoder.reinit_feat()
            decoder.start_utt()
            decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
            decoder.end_utt()
            hypothesis = decoder.hyp()
            texts.append("" if hypothesis is None else hypothesis.hypstr)
        return texts

    return read
