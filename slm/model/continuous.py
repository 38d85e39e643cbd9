"""An LLM that hears continuous features instead of codes: the topline that discrete tokens are held against.

Speech-LLaMA's way in (arXiv 2307.03917; as in SLAM-ASR, arXiv 2402.08846): a frozen encoder's frames, some of them
stacked into one, go through a projector into the LLM's embedding space, between two learnt marks and in front of the
transcript. The LLM's vocabulary stays as it was. Left out of the papers: compression by CTC, and the audio encoder
between encoder and LLM that Speech-LLaMA trains.

Shapes: U utterances; E encoder frames of width D; P = ceil(E / stack) positions; H width of the LLM; T text ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from slm.model.modeling import ModelError, load_llm
from slm.training.answer_loss import AfterHead

FACTS_FILE, PROJECTOR_FILE, LLM_FOLDER = "continuous.json", "projector.safetensors", "llm"


@dataclass
class ProjectorSettings:
    """How an encoder's frames become positions of the LLM."""

    stack: int = field(
        default=4,
        metadata={"help": "frames of the encoder (50 a second) in one position: 4 are 12.5 positions a second"},
    )
    hidden: int = field(default=512, metadata={"help": "width of the projector's hidden layer"})

    def __post_init__(self) -> None:
        if min(self.stack, self.hidden) < 1:
            raise ModelError(f"projector: stack {self.stack} and hidden {self.hidden} must be at least 1")


class Projector(nn.Module):
    """(E, D) frames of one utterance -> (P + 2, H): what the LLM reads, with a mark before and after it.

    Args:
        width: D.
        embedding: Of the LLM; what comes out begins with the spread of its rows.
        settings: Stack and hidden width.
    """

    def __init__(self, width: int, embedding: nn.Module, settings: ProjectorSettings) -> None:
        super().__init__()
        self.stack = settings.stack
        size = embedding.weight.shape[1]
        self.layers = nn.Sequential(
            nn.LayerNorm(width * settings.stack),
            nn.Linear(width * settings.stack, settings.hidden),
            nn.GELU(),
            nn.Linear(settings.hidden, size),
            nn.LayerNorm(size),
        )
        with torch.no_grad():
            # As the layers get them: some models scale what they look up.
            rows = embedding(torch.arange(min(1000, len(embedding.weight)), device=embedding.weight.device)).float()
            spread = rows.square().mean().sqrt()
            self.layers[-1].weight.fill_(spread)
            self.marks = nn.Parameter(torch.randn(2, size) * spread.cpu())

    def forward(self, frames: Tensor) -> Tensor:
        """(E, D) -> (P + 2, H); the last position's missing frames are zeros."""
        padded = F.pad(frames, (0, 0, 0, -len(frames) % self.stack))
        speech = self.layers(padded.reshape(-1, self.stack * frames.shape[1]))
        return torch.cat([self.marks[:1].to(speech.dtype), speech, self.marks[1:].to(speech.dtype)])


class ContinuousLM(nn.Module):
    """A projector and an LLM, which may wear adapters; without the frozen encoder, whose features it is given.

    Args:
        llm: A causal LM, or a PeftModel around one.
        projector: Into its embedding space.
        first_id: What stands before a prompt (bos); None: nothing.
        end_id: What ends a transcript.
    """

    def __init__(self, llm: nn.Module, projector: Projector, first_id: int | None, end_id: int) -> None:
        super().__init__()
        self.llm, self.projector, self.first_id, self.end_id = llm, projector, first_id, end_id

    @property
    def bare(self) -> PreTrainedModel:
        """The causal LM itself."""
        return self.llm.get_base_model() if hasattr(self.llm, "get_base_model") else self.llm

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A tied table once, as files of safetensors want it."""
        known: set[tuple[int, torch.Size]] = set()
        kept = {}
        for name, tensor in super().state_dict(*args, **kwargs).items():
            if (place := (tensor.data_ptr(), tensor.shape)) not in known:
                known.add(place)
                kept[name] = tensor
        return kept

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """The Trainer asks for it when it loads a checkpoint: the other names of tied tables."""
        return [name for name in nn.Module.state_dict(self) if name not in self.state_dict()]

    def tie_weights(self) -> None:
        """The Trainer calls it where those are missing; they are one tensor already."""

    def prompts(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What stands before the transcript of each utterance: (P + 2, H), one more with a bos."""
        first = [] if self.first_id is None else [self._embed(torch.tensor([self.first_id]))]
        return [torch.cat([*first, self.projector(one.to(self._device))]) for one in features]

    def forward(self, features: Sequence[Tensor], texts: Sequence[Tensor]) -> Tensor:
        """The mean over utterances of the mean loss of a transcript's ids and its end.

        Args:
            features: For each utterance (E, D).
            texts: For each (T,) ids.
        """
        rows, answers = [], []
        for prompt, text in zip(self.prompts(features), texts, strict=True):
            rows.append(torch.cat([prompt, self._embed(text).to(prompt.dtype)]) if len(text) else prompt)
            answers.append((len(prompt) - 1, torch.cat([text, text.new_tensor([self.end_id])]).to(self._device)))
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.zeros(embeds.shape[:2], dtype=torch.long, device=self._device)
        for number, row in enumerate(rows):
            mask[number, : len(row)] = 1
        states = self.bare.get_decoder()(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        # The head runs where an answer is, not over prompts and padding.
        told = torch.cat([states[n, start : start + len(ids)] for n, (start, ids) in enumerate(answers)])
        after = AfterHead.of(self.bare.config.get_text_config())
        logits = after(self.bare.get_output_embeddings()(told)).float()
        losses = F.cross_entropy(logits, torch.cat([ids for _, ids in answers]), reduction="none")
        return torch.stack([part.mean() for part in losses.split([len(ids) for _, ids in answers])]).mean()

    @torch.no_grad()
    def generate(self, features: Sequence[Tensor], most: Sequence[int], num_beams: int = 1) -> list[list[int]]:
        """The ids of each transcript, with its end where the model gave one; greedily, or with a beam.

        Args:
            features: For each utterance (E, D).
            most: For each how many ids it may have.
            num_beams: 1 is greedy.
        """
        rows = self.prompts(features)
        longest = max(map(len, rows))
        embeds = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._device)
        settings = GenerationConfig(
            max_new_tokens=max(most),
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=self.end_id,
            pad_token_id=self.end_id,
        )
        written = self.llm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings).tolist()
        ends = (ids.index(self.end_id) + 1 if self.end_id in ids else len(ids) for ids in written)
        return [ids[: min(end, limit)] for ids, end, limit in zip(written, ends, most, strict=True)]

    @property
    def _device(self) -> torch.device:
        return self.projector.marks.device

    def _embed(self, ids: Tensor) -> Tensor:
        return self.bare.get_input_embeddings()(ids.to(self._device))


def is_continuous(folder: str | Path) -> bool:
    """Whether a folder holds a model that `slm finetune-continuous` made."""
    return (Path(folder).expanduser() / FACTS_FILE).is_file()


def save_continuous(
    model: ContinuousLM,
    text_tokenizer: PreTrainedTokenizerBase,
    settings: ProjectorSettings,
    facts: dict[str, Any],
    folder: str | Path,
) -> Path:
    """Writes the LLM (adapters folded in), the projector, and the facts that `load_continuous` gives back."""
    folder = Path(folder)
    if hasattr(model.llm, "merge_and_unload"):
        model.llm = model.llm.merge_and_unload()
    model.llm.save_pretrained(folder / LLM_FOLDER)
    text_tokenizer.save_pretrained(folder / LLM_FOLDER)
    save_file({k: v.contiguous() for k, v in model.projector.state_dict().items()}, folder / PROJECTOR_FILE)
    facts = facts | {"projector": asdict(settings), "first_id": model.first_id, "end_id": model.end_id}
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def load_continuous(
    folder: str | Path, width: int, dtype: str = "fp32"
) -> tuple[ContinuousLM, PreTrainedTokenizerBase, dict[str, Any]]:
    """What `save_continuous` wrote, in eval mode; the facts name its encoder.

    Args:
        folder: RUN_DIR/model.
        width: D of the encoder.
        dtype: How the LLM is held.

    Raises:
        ModelError: A file is missing or does not fit.
    """
    folder = Path(folder).expanduser()
    try:
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        llm, text_tokenizer, _ = load_llm(str(folder / LLM_FOLDER), dtype)
        projector = Projector(width, llm.get_input_embeddings(), ProjectorSettings(**facts["projector"]))
        projector.load_state_dict(load_file(folder / PROJECTOR_FILE))
    except (OSError, KeyError, RuntimeError, TypeError, json.JSONDecodeError) as error:
        raise ModelError(f"model {folder}: not whole ({error}); copy it anew or train it again") from error
    return ContinuousLM(llm, projector, facts["first_id"], facts["end_id"]).eval(), text_tokenizer, facts
