"""Judges: recognisers that read waveforms, so that synthesised speech can be scored by what is heard in it.

A judge is a named choice (:class:`JudgeConfig`); :func:`load_judge` gives a :class:`Judge` whose ``identity`` (weights,
decoding, beams) stands in the protocol of every score. The kinds:

- ``seq2seq``: any ``AutoModelForSpeechSeq2Seq`` (Whisper, Moonshine, our recogniser folder), read with ``generate``;
  with ``decoding: joint`` our recogniser folder's CTC head has its say in it (:mod:`eval.judges.joint`);
- ``ctc-head``: our recogniser folder through the CTC head on its encoder (``ctc_head.safetensors``), greedy;
- ``ctc``: any ``AutoModelForCTC`` (wav2vec2, HuBERT), greedy;
- ``pocketsphinx``: a classical recogniser that carries its own model (extra ``eval``). It had no part in any training;
- ``faster-whisper``, ``paraformer``: what published protocols read with and transformers does not load, through the
  packages that do (:mod:`eval.judges.packages`).

Shapes: B clips, S samples, M mel bins, T encoder frames, D width, V vocabulary, L text tokens.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.no_speech import NoSpeechRule, active_part, without_repetition
from eval.judges.packages import LIBRARIES, faster_whisper_reader, package_kind, paraformer_reader
from eval.judges.readers import (
    CTC_HEAD_FILE,
    OPEN_WINDOW_S,
    Reader,
    ctc_head_reader,
    ctc_reader,
    seq2seq_reader,
)
from eval.judges.sphinx import pocketsphinx_reader
from eval.protocol import pinned_identity
from eval.speech.audio import length_batches, resample, split_at_quiet

_HUB_TIMEOUT_S, _HUB_WAIT_S = 5.0, 1.0  # for the hub's answer, and before a second question
# So long a hub that could not be reached is not asked again: a comparison may hold dozens of names.
_HUB_BELIEVED_S = 60.0
_unreached: list[tuple[float, str]] = []  # when it could not be reached last, and the kind of the error
_FRAME_S = 0.02  # one frame of a Whisper encoder
_UNCUT_S = 1e6  # for what cuts long recordings itself
_SHORTEST_S = 0.1  # shorter clips are padded: convolutional front ends need some input
# Raise it with every change in this folder or in eval.speech.audio that changes a transcript: transcripts that were
# kept under another rule are not used.
READING_RULE = 2


@dataclass
class Judge:
    """A loaded recogniser.

    Attributes:
        identity: JSON-able facts that pin what was heard: weights, decoding, beams.
        sampling_rate: the rate the model listens at; other audio is resampled.
        window_s: longest piece read at once; longer audio is cut in its quietest places.
        batch_size: pieces read together, at most.
        batch_seconds: their seconds with padding, at most.
        no_speech: the rule for what is read as nothing (:mod:`eval.judges.no_speech`).
    """

    identity: dict[str, Any]
    sampling_rate: int
    window_s: float
    batch_size: int
    batch_seconds: float
    _read: Reader
    no_speech: NoSpeechRule = "off"

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
            if self.no_speech != "off":
                audio = active_part(audio, self.sampling_rate)
                if audio is None:
                    continue
            shortest = math.ceil(_SHORTEST_S * self.sampling_rate)
            for piece in split_at_quiet(audio, self.sampling_rate, self.window_s):
                pieces.append((position, np.pad(piece, (0, max(0, shortest - len(piece))))))
        texts = [""] * len(pieces)
        # Clips of one length together: less padding, and one bound on the answer's length fits them all.
        lengths = [len(piece) for _, piece in pieces]
        for batch in length_batches(lengths, self.batch_seconds * self.sampling_rate, self.batch_size):
            for i, text in zip(batch, self._read([pieces[i][1] for i in batch]), strict=True):
                texts[i] = text
        found: list[list[str]] = [[] for _ in audios]
        for (position, _), text in zip(pieces, texts, strict=True):
            text = text if self.no_speech == "off" else without_repetition(text)
            found[position].append(text.strip())
        return [" ".join(filter(None, parts)) for parts in found]


def _kind(config: JudgeConfig) -> tuple[str, Any]:
    """Which kind a configuration means, and the transformers config (None where transformers does not load it)."""
    if config.name == "pocketsphinx":
        try:
            metadata.version("pocketsphinx")
        except metadata.PackageNotFoundError:
            raise JudgeError(
                "judge 'pocketsphinx' is not installed: pip install 'lmspt-slm[eval]', or name another judge"
            ) from None
        return "pocketsphinx", None
    if (kind := package_kind(config)) is not None:
        return kind, None
    if Path(config.name).is_file():
        raise JudgeError(f"judge {config.name!r}: a file; give the folder of a saved model (RUN_DIR/model)")
    if config.name.count("/") != 1 and not Path(config.name).is_dir():  # before a hub is asked, again and again
        raise JudgeError(
            f"judge {config.name!r}: no such folder, and a hub name is `owner/name`; take embedded-recogniser or "
            "pocketsphinx, train one with `slm train-teacher`, or correct the path"
        )
    from transformers import AutoConfig, AutoModelForCTC, AutoModelForSpeechSeq2Seq

    try:
        if not Path(config.name).is_dir():
            _ask_hub(config.name, config.revision)
        model_config = AutoConfig.from_pretrained(config.name, revision=config.revision)
    except (OSError, ValueError) as error:
        raise JudgeError(
            f"judge {config.name!r} is neither a local model folder nor a hub model that can be reached ({error}). "
            "Train one with `slm train-teacher`, copy a model folder here, or use name=pocketsphinx"
        ) from error
    seq2seq = type(model_config) in AutoModelForSpeechSeq2Seq._model_mapping
    ctc = type(model_config) in AutoModelForCTC._model_mapping
    if config.decoding == "auto" and seq2seq and _reads_by_ctc_only(Path(config.name)):
        return "ctc-head", model_config
    if config.decoding in ("ctc", "joint") and seq2seq and not ctc:
        if not (Path(config.name) / CTC_HEAD_FILE).is_file():
            raise JudgeError(f"judge {config.name!r} has no {CTC_HEAD_FILE}: use decoding=attention")
        if config.decoding == "ctc":
            return "ctc-head", model_config
        if _reads_by_ctc_only(Path(config.name)):
            raise JudgeError(f"judge {config.name!r}: its decoder was never trained; use decoding=ctc, not joint")
        return "seq2seq", model_config
    if ctc and config.decoding in ("ctc", "auto"):
        return "ctc", model_config
    if seq2seq and config.decoding in ("attention", "auto"):
        return "seq2seq", model_config
    raise JudgeError(
        f"judge {config.name!r} ({model_config.model_type}) cannot be read with decoding={config.decoding}: it is "
        f"{'a CTC model' if ctc else 'a sequence-to-sequence model' if seq2seq else 'not a speech recogniser'}"
    )


def _ask_hub(name: str, revision: str | None) -> None:
    """Raises OSError where a model is not in the local cache and the hub does not answer.

    It is asked twice, a second apart, and after that not for a minute; the libraries would go on for half a minute.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    if not (_unreached and time.monotonic() - _unreached[0][0] < _HUB_BELIEVED_S):
        for wait_s in (0.0, _HUB_WAIT_S):
            time.sleep(wait_s)
            try:
                HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
            except HfHubHTTPError:  # it answers: what is wrong with the name the library says
                pass
            except Exception as error:  # every network library raises its own
                _unreached[:] = [(time.monotonic(), type(error).__name__)]
                continue
            _unreached.clear()
            return
    raise OSError(f"{_unreached[0][1]}; where there is never a network, HF_HUB_OFFLINE=1 leaves the asking out")


def _reads_by_ctc_only(folder: Path) -> bool:
    """Whether a recogniser folder says that its decoder was never trained (`slm train-teacher` with CTC alone)."""
    if not (folder / CTC_HEAD_FILE).is_file():
        return False
    from safetensors import safe_open

    with safe_open(folder / CTC_HEAD_FILE, "pt") as head:
        return (head.metadata() or {}).get("decoder") == "untrained"


def _weights_sha256(folder: Path) -> str:
    """Digest of a local folder's weights, settings and tokenizer: what decides which text comes out."""
    files = [
        path
        for ending in ("*.safetensors", "pytorch_model*.bin", "*.json", "*.txt", "*.model")
        for path in folder.glob(ending)
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
    beams = config.num_beams if kind in ("seq2seq", "faster-whisper") else 1
    if config.num_beams != beams:
        raise JudgeError(f"judge {config.name!r}: num_beams={config.num_beams} needs decoding=attention, not {kind}")
    if config.processes > 1 and kind != "pocketsphinx":
        raise JudgeError(f"judge {config.name!r}: processes={config.processes} is for pocketsphinx alone")
    identity: dict[str, Any] = {"name": config.display_name(), "kind": kind, "no_speech": config.no_speech}
    if kind == "pocketsphinx":
        if config.decoding != "auto":
            raise JudgeError(f"judge 'pocketsphinx': decoding={config.decoding} is not for it; leave it at auto")
        return identity | {"revision": f"pocketsphinx {metadata.version('pocketsphinx')}", "decoding": "default"}
    if kind in LIBRARIES:
        identity["source"] = config.name
        identity["revision"] = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES[kind])
        if kind == "paraformer":
            return identity | {"decoding": "default", "language": "zh"}
        return identity | {"decoding": "attention", "num_beams": beams, "language": config.language or "en"}
    if Path(config.name).is_dir():
        identity["weights_sha256"] = _weights_sha256(Path(config.name))
    else:
        identity["source"] = config.name
        identity["revision"] = getattr(model_config, "_commit_hash", None) or config.revision
    identity |= {"decoding": "attention" if kind == "seq2seq" else "ctc", "num_beams": beams}
    if config.decoding == "joint":
        identity |= {"decoding": "joint", "ctc_weight": config.ctc_weight}
    if kind == "seq2seq":
        identity |= {"language": spoken_language(config), "max_tokens_per_second": config.max_tokens_per_second}
        if identity["language"] is not None:
            identity["task"] = "transcribe"
    return identity


def spoken_language(config: JudgeConfig) -> str | None:
    """The language that a judge is told of: a code, "auto" where it guesses each clip's, None where it knows one only.

    Raises:
        JudgeError: for a language that the judge does not know.
    """
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(config.name, revision=config.revision)
    except OSError:  # a model may have none
        settings = GenerationConfig()
    codes = [token.strip("<|>") for token in getattr(settings, "lang_to_id", None) or {}]
    if not getattr(settings, "is_multilingual", bool(codes)) or not codes:
        if config.language not in (None, "en", "auto"):
            raise JudgeError(f"judge {config.name!r} knows one language and cannot be told language={config.language}")
        return None
    language = config.language or "en"
    if language not in ("auto", *codes):
        raise JudgeError(
            f"judge {config.name!r}: language={language} is not one of its {len(codes)}: {', '.join(codes)}"
        )
    return language


def conditions_of(identity: dict[str, Any], device: str) -> dict[str, Any] | None:
    """All that decides a judge's transcript beside the audio, as JSON, for transcripts that are kept.

    The identity without its name in tables (:func:`eval.protocol.pinned_identity`), the precision, the kind of device,
    and the versions of what reads: our rule and the libraries. None where nothing pins the weights: then a transcript
    says nothing about the next run's.
    """
    if identity.get("weights_sha256") is None and identity.get("revision") is None:
        return None
    if identity["kind"] == "pocketsphinx" or identity["kind"] in LIBRARIES:  # its own version is its revision
        libraries: tuple[str, ...] = ("numpy", "soxr")
    else:
        libraries = ("numpy", "soxr", "torch", "transformers")
    return pinned_identity(identity) | {
        "precision": "fp32",
        "device": torch.device(device).type,
        "reading_rule": READING_RULE,
        "libraries": {name: metadata.version(name) for name in libraries},
    }


def _loaded(config: JudgeConfig, load: Callable[[], Any]) -> Any:
    """What ``load`` returns. Raises JudgeError where it cannot: each library has errors of its own for a torn file."""
    try:
        return load()
    except Exception as error:
        raise JudgeError(
            f"judge {config.name!r} is incomplete or damaged: it cannot be loaded ({type(error).__name__}: {error}). "
            "Copy or download it anew, or name another judge; what was heard so far is kept"
        ) from error


def load_judge(config: JudgeConfig, device: str = "cpu") -> Judge:
    """Load a judge onto a device.

    Raises:
        JudgeError: the judge is not there, or cannot be read in the configured way.
    """
    identity = check_judge(config)
    if identity["kind"] == "pocketsphinx":
        read = pocketsphinx_reader(config.processes)
        return Judge(identity, 16_000, OPEN_WINDOW_S, config.batch_size, config.batch_seconds, read, config.no_speech)
    if identity["kind"] in LIBRARIES:
        reader = paraformer_reader if identity["kind"] == "paraformer" else faster_whisper_reader
        read = _loaded(config, lambda: reader(config, device))
        return Judge(identity, 16_000, _UNCUT_S, 1, config.batch_seconds, read, config.no_speech)
    kind, model_config = _kind(config)
    from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoModelForSpeechSeq2Seq, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": config.name, "revision": config.revision}
    auto = AutoModelForCTC if kind == "ctc" else AutoModelForSpeechSeq2Seq
    # fp32 whatever it is on disk: that is what the features are.
    model = _loaded(config, lambda: auto.from_pretrained(**source, dtype=torch.float32).eval().to(device))
    extractor = _loaded(config, lambda: AutoFeatureExtractor.from_pretrained(**source))
    tokenizer = _loaded(config, lambda: AutoTokenizer.from_pretrained(**source))
    whisper = model_config.model_type == "whisper"
    window_s = model_config.max_source_positions * _FRAME_S if whisper else OPEN_WINDOW_S
    rate = extractor.sampling_rate

    def features(clips: list[np.ndarray], attention_mask: bool = True) -> dict[str, torch.Tensor]:
        # A Whisper encoder takes exactly its window; others take the longest clip of the batch.
        length = {"padding": "max_length", "max_length": round(window_s * rate)} if whisper else {"padding": True}
        batch = extractor(clips, sampling_rate=rate, return_tensors="pt", **length)
        return {key: value.to(device) for key, value in batch.items() if attention_mask or key != "attention_mask"}

    if kind == "ctc":
        read = ctc_reader(model, features, tokenizer, extractor)
    elif kind == "ctc-head":
        read = ctc_head_reader(model, features, tokenizer, Path(config.name))
    else:
        read = seq2seq_reader(model, features, tokenizer, config, rate, whisper, identity["language"])
    # To a Whisper encoder every clip is as long as its window.
    count = min(config.batch_size, max(1, int(config.batch_seconds / window_s))) if whisper else config.batch_size
    return Judge(identity, rate, window_s, count, config.batch_seconds, read, config.no_speech)
