"""A small recogniser trained from scratch: the offline teacher of the distillation and the offline judge of the scores.

It is a WhisperForConditionalGeneration, so what reads Whisper reads it, with a CTC head on its encoder during
training: attention alone does not find the alignment in a few hundred steps on an hour of speech. With `quantizer` set
it becomes the trainer of a supervised speech tokenizer instead (`supervised.py`), and only that is saved.

Shapes: B batch, M mel channels, T mel frames (100 Hz), E = T / 2 encoder frames, L label characters, V characters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tokenizer.codecs.supervised import (
    ENCODER_HZ,
    SemanticQuantizer,
    SemanticQuantizerConfig,
    SupervisedTokenizerModel,
    first_layers,
    last_layers,
)
from tokenizer.model.book import BookOutput
from tokenizer.teacher.whisper import encoder_window

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = " 'abcdefghijklmnopqrstuvwxyz"
PAD, BOS, EOS = 0, 1, 2
CTC_HEAD_FILE = "ctc_head.safetensors"


@dataclass
class RecogniserConfig:
    """Size and regularisation of the recogniser. The defaults train on one CPU core in minutes."""

    hidden_size: int = field(default=192, metadata={"help": "width of encoder and decoder"})
    encoder_layers: int = field(default=4, metadata={"help": "transformer layers in the encoder"})
    decoder_layers: int = field(default=2, metadata={"help": "transformer layers in the decoder"})
    n_mels: int = field(default=80, metadata={"help": "mel channels of the front end"})
    window_s: float = field(default=10.0, metadata={"help": "longest input at once, seconds; longer input is chunked"})
    max_characters: int = field(default=256, metadata={"help": "longest transcript, characters"})
    dropout: float = field(default=0.1, metadata={"help": "dropout in every layer"})
    ctc_weight: float = field(
        default=0.4, metadata={"help": "share of CTC in the loss; 1: CTC alone, no decoder training"}
    )
    mask_time_prob: float = field(
        default=0.05, metadata={"help": "SpecAugment: share of frames that start a time mask"}
    )
    mask_feature_prob: float = field(
        default=0.05, metadata={"help": "SpecAugment: share of channels that start a mask"}
    )
    quantizer: SemanticQuantizerConfig | None = field(
        default=None,
        metadata={"help": "make a supervised speech tokenizer: quantize inside the encoder, e.g. {frame_rate_hz: 25}"},
    )

    def __post_init__(self) -> None:
        problems = []
        if self.hidden_size % 64:
            problems.append(f"hidden_size={self.hidden_size}: must be a multiple of 64 (the width of a head)")
        if not 0 <= self.ctc_weight <= 1:
            problems.append(f"ctc_weight={self.ctc_weight}: must lie in [0, 1]")
        if round(self.window_s * 100) % 2 or self.window_s <= 0:
            problems.append(f"window_s={self.window_s}: must be a positive multiple of 0.02")
        if self.quantizer is not None:
            if self.quantizer.layer > self.encoder_layers:
                problems.append(
                    f"quantizer.layer={self.quantizer.layer}: there are {self.encoder_layers} encoder_layers"
                )
            if round(self.window_s * ENCODER_HZ) % self.quantizer.stride:
                problems.append(f"window_s={self.window_s:g}: must hold whole codes of quantizer.frame_rate_hz")
        if problems:
            raise ValueError("recogniser: " + "; ".join(problems))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One id per character: space, apostrophe, a to z, after four special tokens. Texts come normalised to these."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


@dataclass
class RecogniserLosses:
    """Scalars of one batch; `attention` is None where the decoder is not trained, `quantizer` where there is none."""

    loss: Tensor
    ctc: Tensor
    attention: Tensor | None
    quantizer: Tensor | None = None


class Recogniser(WhisperForConditionalGeneration):
    """Whisper with a CTC head on its encoder. The blank is the padding token.

    With a quantizer in the encoder, what comes after it reads the codes' vectors alone.
    """

    def __init__(self, config: WhisperConfig, quantizer: SemanticQuantizerConfig | None = None) -> None:
        super().__init__(config)
        self.ctc_head = nn.Linear(config.d_model, config.vocab_size)
        self.quantizer = None if quantizer is None else SemanticQuantizer(config.d_model, quantizer)
        self._quantized: tuple[BookOutput, Tensor] | None = None
        self.post_init()
        if self.quantizer is not None:
            self.quantizer.initialise()

    @classmethod
    def from_scratch(cls, config: RecogniserConfig) -> Recogniser:
        width = config.hidden_size
        return cls(
            WhisperConfig(
                vocab_size=len(SPECIAL_TOKENS) + len(CHARACTERS),
                num_mel_bins=config.n_mels,
                d_model=width,
                encoder_layers=config.encoder_layers,
                decoder_layers=config.decoder_layers,
                encoder_attention_heads=width // 64,
                decoder_attention_heads=width // 64,
                encoder_ffn_dim=4 * width,
                decoder_ffn_dim=4 * width,
                max_source_positions=round(config.window_s * 50),
                max_target_positions=config.max_characters + 2,
                dropout=config.dropout,
                apply_spec_augment=True,
                mask_time_prob=config.mask_time_prob,
                mask_feature_prob=config.mask_feature_prob,
                mask_feature_length=8,
                pad_token_id=PAD,
                bos_token_id=BOS,
                eos_token_id=EOS,
                decoder_start_token_id=BOS,
            ),
            config.quantizer,
        )

    def ctc_logits(self, input_features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Maps log-mels (B, M, T) of `lengths` (B,) samples to CTC logits (B, E, V)."""
        return self.ctc_head(self._encode(input_features, lengths))

    def _encode(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """Hidden states (B, E, C) of log-mels (B, M, T); a quantizer does not see what lies past `lengths` samples."""
        encoder = self.model.encoder
        with encoder_window(encoder, features.shape[-1]):
            if self.quantizer is None:
                return encoder(features).last_hidden_state
            layers, stride = self.quantizer.config.layer, self.quantizer.config.stride
            frames = features.shape[-1] // 2
            mask = torch.ones(len(features), frames // stride, dtype=torch.bool, device=features.device)
            if lengths is not None:
                codes = torch.arange(frames // stride, device=features.device)
                mask = codes * self.quantizer.config.hop_length < lengths.to(features.device)[:, None]
            hidden = first_layers(encoder, features, layers, frames, mask.repeat_interleave(stride, dim=1))
            book = self.quantizer.quantize(hidden, mask)
            self._quantized = (book, mask)
            return last_layers(encoder, self.quantizer.spread(book.quantized.to(hidden.dtype)), layers)

    def maintain_codebook(self) -> int:
        """Follows the use of the quantizer's entries after a training batch; returns how many were revived."""
        if self.quantizer is None or self._quantized is None:
            return 0
        return self.quantizer.maintain(*self._quantized)

    def forward(
        self, input_features: Tensor, labels: Tensor, ctc_weight: float, lengths: Tensor | None = None
    ) -> RecogniserLosses:
        """Joint CTC / attention loss, both per character. Inference goes through the saved plain Whisper.

        Args:
            input_features: log-mels (B, M, T), T at most the window.
            labels: characters and </s> (B, L), -100 past the end.
            ctc_weight: weight of the CTC loss in [0, 1].
            lengths: samples of each item (B,), for a quantizer; None where none is padded.
        """
        model = self.model
        # WhisperModel.forward masks the features and always runs the decoder; CTC alone needs only the first.
        features = model._mask_input_features(input_features)
        hidden = self._encode(features, lengths)
        is_character = (labels != -100) & (labels != EOS)
        log_probabilities = self.ctc_head(hidden).float().log_softmax(-1).transpose(0, 1)
        ctc = nn.functional.ctc_loss(
            log_probabilities,
            labels[is_character],
            torch.full((len(labels),), hidden.shape[1], dtype=torch.long),
            is_character.sum(1).cpu(),
            blank=PAD,
            zero_infinity=True,
        )
        if ctc_weight == 1.0:
            return self._with_quantizer(RecogniserLosses(loss=ctc, ctc=ctc, attention=None))
        decoder_input = torch.where(labels == -100, PAD, labels)
        decoder_input = torch.cat([torch.full_like(decoder_input[:, :1], BOS), decoder_input[:, :-1]], dim=1)
        decoded = model.decoder(
            input_ids=decoder_input, encoder_hidden_states=hidden, use_cache=False
        ).last_hidden_state
        logits = self.proj_out(decoded).float()
        attention = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        return self._with_quantizer(RecogniserLosses(ctc_weight * ctc + (1 - ctc_weight) * attention, ctc, attention))

    def _with_quantizer(self, losses: RecogniserLosses) -> RecogniserLosses:
        if self.quantizer is not None:
            book, config = self._quantized[0], self.quantizer.config
            losses.quantizer = config.commitment_weight * book.commitment_loss.mean()
            losses.quantizer = losses.quantizer + config.codebook_weight * book.codebook_loss.mean()
            losses.loss = losses.loss + losses.quantizer
        return losses


def greedy_ctc(logits: Tensor) -> list[list[int]]:
    """Best path of CTC logits (B, E, V): repeats joined, blanks dropped."""
    paths = logits.argmax(-1)
    texts = []
    for path in paths:
        merged = torch.unique_consecutive(path)
        texts.append(merged[merged != PAD].tolist())
    return texts


def save_recogniser(recogniser: Recogniser, folder: Path, decoder_trained: bool = True) -> None:
    """Writes a folder that AutoModelForSpeechSeq2Seq, AutoTokenizer and AutoFeatureExtractor load, plus the CTC head.

    The CTC head is a file of its own: a reader that knows only Whisper sees a plain Whisper folder. Its metadata says
    whether the decoder was trained too; where it was not, the CTC head is the only way to read this recogniser.

    Of a recogniser with a quantizer only the tokenizer is written, as `load_tokenizer` reads it: a reader that knows
    only Whisper would run past the quantizer and not notice.
    """
    if recogniser.quantizer is not None:
        SupervisedTokenizerModel.from_recogniser(recogniser.model.encoder, recogniser.quantizer).save_pretrained(folder)
        return
    config = recogniser.config
    plain = WhisperForConditionalGeneration(config)
    state = {name: value for name, value in recogniser.state_dict().items() if not name.startswith("ctc_head.")}
    plain.load_state_dict(state)
    plain.generation_config = GenerationConfig(
        decoder_start_token_id=BOS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        max_length=config.max_target_positions,
    )
    plain.save_pretrained(folder)
    head = {name: value.detach().float().cpu().contiguous() for name, value in recogniser.ctc_head.state_dict().items()}
    save_file(head, folder / CTC_HEAD_FILE, metadata={"decoder": "trained" if decoder_trained else "untrained"})
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder)
    # Whisper's own tokenizer class would be picked for a Whisper model: say that this one is plain.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    feature_extractor(config).save_pretrained(folder)


def feature_extractor(config: WhisperConfig) -> WhisperFeatureExtractor:
    """The log-mel front end for a recogniser's window; `chunk_length` rounds it up to whole seconds."""
    return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=-(-config.max_source_positions // 50))
