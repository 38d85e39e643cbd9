"""pocketsphinx, in this process or in several. Light to import: each process of the pool does so.

Shapes: S samples of one waveform at 16 kHz.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from typing import Any

import numpy as np


def new_decoder() -> Any:
    """pocketsphinx's decoder with the model that comes with it."""
    from pocketsphinx import Decoder

    return Decoder(samprate=16_000, loglevel="FATAL")


def read_clip(clip: np.ndarray, decoder: Any) -> str:
    """What a decoder hears in a waveform (S,); the text does not depend on what it read before."""
    # It was trained on speech at full level and takes 16-bit samples: a quiet recording is brought up.
    peak = float(np.abs(clip).max())
    samples = (clip * (0.9 * 32767 / peak if peak > 0 else 0.0)).astype(np.int16)
    # Its front end carries state on: without this a text depends on what was read before.
    decoder.reinit_feat()
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
    decoder.end_utt()
    hypothesis = decoder.hyp()
    return "" if hypothesis is None else str(hypothesis.hypstr)


_own_decoder = cache(new_decoder)  # of a process of the pool


def _read_in_pool(clip: np.ndarray) -> str:
    return read_clip(clip, _own_decoder())


def pocketsphinx_reader(processes: int = 1) -> Callable[[list[np.ndarray]], list[str]]:
    """Clips -> texts, the same whatever the number of processes (it keeps Python's lock: threads would not do)."""
    if processes == 1:
        decoder = new_decoder()
        return lambda clips: [read_clip(clip, decoder) for clip in clips]
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    atexit.register(pool.shutdown)
    return lambda clips: list(pool.map(_read_in_pool, clips))
