"""A small recogniser that reads codes: how much of the text a cheap model can get out of them.

Embeddings of the codes, two bidirectional GRU layers, and CTC (Graves et al. 2006) over characters. Each frame answers
with several characters or blanks, so that codes of few frames can spell a text at all. It is a proxy: how well a large
model would read the same codes it does not say, and its errors belong to its size and its training text as well.

What is chosen (the learning rate, how long to train) is chosen by the character error rate on the valid utterances.
The test utterances are read once, by the model that was chosen.

Shapes: B utterances of a batch, K books that are read, F frames, R answers of a frame, V characters and the blank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

__all__ = ["CodeProbe", "CodedText", "ProbeConfig", "ProbeOutcome", "Trial", "train_probe"]

_BLANK = 0


@dataclass
class ProbeConfig:
    """Size and training of the probe."""

    books: int = field(default=1, metadata={"help": "how many books it reads, the first ones; 0: all"})
    hidden_size: int = field(default=128, metadata={"help": "width of each direction of the GRU layers"})
    answers_hz: float = field(
        default=50.0, metadata={"help": "answers a second at least: a frame gives several where frames are fewer"}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3], metadata={"help": "tried one after the other; the valid split chooses"}
    )
    steps: int = field(default=1000, metadata={"help": "steps of each training"})
    check_steps: int = field(default=100, metadata={"help": "steps between two readings of the valid split"})
    batch_size: int = field(default=16, metadata={"help": "utterances of a step"})
    dropout: float = field(default=0.2, metadata={"help": "between the layers"})

    def __post_init__(self) -> None:
        small = [key for key in ("hidden_size", "steps", "check_steps", "batch_size") if getattr(self, key) < 1]
        if small or self.books < 0 or self.answers_hz <= 0:
            raise ValueError(f"{', '.join(small) or 'books, answers_hz'}: must be at least 1 (books: 0 for all)")
        if not self.learning_rates or min(self.learning_rates) <= 0 or not 0 <= self.dropout < 1:
            raise ValueError("learning_rates: give at least one above 0; dropout must lie in [0, 1)")


@dataclass(frozen=True)
class CodedText:
    """Codes (K, F) of one utterance and its text, already normalised."""

    codes: np.ndarray
    text: str


@dataclass(frozen=True)
class Trial:
    """One training: its learning rate, the step that was best on the valid utterances, and their CER there."""

    learning_rate: float
    step: int
    valid_cer: float


@dataclass(frozen=True)
class ProbeOutcome:
    """What the chosen probe read in the test utterances, in their order, and how it was chosen."""

    hypotheses: list[str]
    chosen: Trial
    trials: list[Trial]
    n_parameters: int
    answers_per_frame: int
    n_too_short: int  # training utterances with too few answers to spell their text


class CodeProbe(nn.Module):
    """Codes (B, K, F) to CTC log-probabilities (B, F x R, V).

    Args:
        codebook_sizes: entries of the K books that are read.
        n_characters: V - 1.
        config: width and dropout.
        answers_per_frame: R.
    """

    def __init__(
        self, codebook_sizes: Sequence[int], n_characters: int, config: ProbeConfig, answers_per_frame: int
    ) -> None:
        super().__init__()
        width = config.hidden_size
        self.answers_per_frame = answers_per_frame
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in codebook_sizes)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(config.dropout)
        self.layers = nn.GRU(width, width, 2, batch_first=True, bidirectional=True, dropout=config.dropout)
        self.head = nn.Linear(2 * width, answers_per_frame * (n_characters + 1))

    def forward(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """Log-probabilities (B, F x R, V) of codes (B, K, F); what lies past `lengths` (B,) frames reaches no other."""
        vectors = sum(table(codes[:, book]) for book, table in enumerate(self.embeddings))
        packed = pack_padded_sequence(
            self.dropout(self.norm(vectors)), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        hidden, _ = pad_packed_sequence(self.layers(packed)[0], batch_first=True, total_length=codes.shape[-1])
        logits = self.head(self.dropout(hidden))
        return logits.unflatten(-1, (self.answers_per_frame, -1)).flatten(1, 2).log_softmax(-1)


def train_probe(
    train: Sequence[CodedText],
    valid: Sequence[CodedText],
    test: Sequence[CodedText],
    codebook_sizes: Sequence[int],
    frame_rate_hz: float,
    config: ProbeConfig,
    seed: int = 0,
    device: str = "cpu",
    stepped: Callable[[], None] = lambda: None,
) -> ProbeOutcome:
    """Trains a probe with each learning rate, chooses on `valid`, reads `test`.

    Args:
        train: utterances to learn from; those without a text are left out.
        valid: utterances to choose by.
        test: utterances that the chosen probe reads.
        codebook_sizes: entries of each book, book 0 first.
        frame_rate_hz: frames a second.
        config: size and training.
        seed: of weights and order; one seed is one draw.
        device: where it is trained.
        stepped: called after each step.

    Raises:
        ValueError: nothing to learn from or to choose by, or more books than there are.
    """
    n_books = config.books or len(codebook_sizes)
    if n_books > len(codebook_sizes):
        raise ValueError(f"probe.books={n_books}: the codes have {len(codebook_sizes)}")
    learned = [item for item in train if item.text]
    if not learned or not any(item.text for item in valid):
        raise ValueError("the probe needs texts in the train and in the valid split")
    characters = sorted(set("".join(item.text for item in learned)))
    number = {character: place + 1 for place, character in enumerate(characters)}
    repeat = math.ceil(config.answers_hz / frame_rate_hz)
    too_short = [_answers_needed(item.text) > repeat * item.codes.shape[1] for item in learned]
    trials: list[Trial] = []
    best: tuple[float, dict[str, Tensor]] | None = None
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        for rate in config.learning_rates:
            torch.manual_seed(seed)
            model = CodeProbe(codebook_sizes[:n_books], len(characters), config, repeat).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, config.steps, pct_start=0.1)
            order = _Order(len(learned), config.batch_size, seed)
            found = Trial(rate, 0, math.inf)
            for step in range(1, config.steps + 1):
                model.train()
                loss = _ctc_loss(model, [learned[place] for place in order.next()], number, device)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                stepped()
                if step % config.check_steps == 0 or step == config.steps:
                    cer = _character_error_rate(valid, _read(model, valid, characters, config.batch_size, device))
                    if cer < found.valid_cer:
                        found = Trial(rate, step, cer)
                    if best is None or cer < best[0]:
                        best = cer, {name: value.clone() for name, value in model.state_dict().items()}
            trials.append(found)
        model.load_state_dict(best[1])
    chosen = min(trials, key=lambda trial: trial.valid_cer)
    hypotheses = _read(model, test, characters, config.batch_size, device)
    size = sum(parameter.numel() for parameter in model.parameters())
    return ProbeOutcome(hypotheses, chosen, trials, size, repeat, sum(too_short))


class _Order:
    """Batches of positions, each position once before any comes again."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._rng, self._count, self._size = np.random.default_rng(seed), count, batch_size
        self._waiting: list[int] = []

    def next(self) -> list[int]:
        if not self._waiting:
            self._waiting = self._rng.permutation(self._count).tolist()
        batch, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return batch


def _answers_needed(text: str) -> int:
    """CTC needs an answer for each character and a blank between two that are the same."""
    return len(text) + sum(a == b for a, b in zip(text, text[1:], strict=False))


def _batch(items: Sequence[CodedText], n_books: int, device: str) -> tuple[Tensor, Tensor]:
    """Codes (B, K, F) padded with 0, and their lengths (B,)."""
    codes = [torch.from_numpy(item.codes[:n_books].T.astype(np.int64)) for item in items]
    return pad_sequence(codes, batch_first=True).transpose(1, 2).to(device), torch.tensor([len(c) for c in codes])


def _ctc_loss(model: CodeProbe, items: Sequence[CodedText], number: dict[str, int], device: str) -> Tensor:
    codes, lengths = _batch(items, len(model.embeddings), device)
    labels = [torch.tensor([number[character] for character in item.text]) for item in items]
    return nn.functional.ctc_loss(
        model(codes, lengths).transpose(0, 1),
        torch.cat(labels).to(device),
        lengths * model.answers_per_frame,
        torch.tensor([len(label) for label in labels]),
        blank=_BLANK,
        zero_infinity=True,
    )


@torch.inference_mode()
def _read(
    model: CodeProbe, items: Sequence[CodedText], characters: Sequence[str], batch_size: int, device: str
) -> list[str]:
    """Greedy transcripts: the best answer of each place, repetitions and blanks taken out."""
    model.eval()
    found = [""] * len(items)
    by_length = sorted(range(len(items)), key=lambda place: items[place].codes.shape[1])
    for start in range(0, len(items), 4 * batch_size):
        places = by_length[start : start + 4 * batch_size]
        codes, lengths = _batch([items[place] for place in places], len(model.embeddings), device)
        answers = model(codes, lengths).argmax(-1).cpu()
        for place, row, length in zip(places, answers, lengths.tolist(), strict=True):
            kept = torch.unique_consecutive(row[: length * model.answers_per_frame]).tolist()
            found[place] = "".join(characters[answer - 1] for answer in kept if answer != _BLANK).strip()
    return found


def _character_error_rate(items: Sequence[CodedText], hypotheses: Sequence[str]) -> float:
    errors = sum(Levenshtein.distance(item.text, text) for item, text in zip(items, hypotheses, strict=True))
    return errors / max(1, sum(len(item.text) for item in items))
