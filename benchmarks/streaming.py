"""Latency and speed of streaming, by hand: ``python benchmarks/streaming.py [TOKENIZER] [--seconds 30] [--threads 1]``.

TOKENIZER is a causal preset (speed does not depend on training) or a folder. Samples are pushed one code frame at a
time, codes one by one. Printed: the algorithmic latency, computing time per frame (median and 95th percentile),
real-time factors of streaming and of the same work at once, and whether the two agree.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from tokenizer import load_tokenizer
from tokenizer.long_form.streaming import StreamingDecoder, StreamingEncoder


def timed(push: Callable[[Tensor], Tensor], pieces: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What the pushes return, and their seconds (n,)."""
    found, seconds = [], []
    for piece in pieces:
        started = time.perf_counter()
        found.append(push(piece))
        seconds.append(time.perf_counter() - started)
    return found, torch.tensor(seconds)


def report(name: str, seconds: Tensor, rest_s: float, whole_s: float, duration_s: float) -> None:
    milliseconds = 1000 * seconds
    print(
        f"{name}: {milliseconds.median():.1f} ms a frame (95 %: {milliseconds.quantile(0.95):.1f}), real-time factor "
        f"{(float(seconds.sum()) + rest_s) / duration_s:.4f} streamed, {whole_s / duration_s:.4f} at once"
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", nargs="?", default="nano-12.5hz-causal")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a preset's weights are random, as it says
        tokenizer = load_tokenizer(options.tokenizer)
    config = tokenizer.config
    n_frames = max(1, round(options.seconds * config.frame_rate))
    duration_s = n_frames / config.frame_rate
    values = 0.1 * torch.randn(1, 1, n_frames * config.hop_length)
    encoder, decoder = StreamingEncoder(tokenizer), StreamingDecoder(tokenizer)
    print(
        f"{options.tokenizer}: {n_frames} frames at {config.frame_rate:g} Hz, {options.threads} thread(s); "
        f"algorithmic latency {1000 * encoder.algorithmic_latency_s:.1f} ms to code + "
        f"{1000 * decoder.algorithmic_latency_s:.1f} ms to decode"
    )
    tokenizer.decode(tokenizer.encode(values[..., : config.hop_length]).audio_codes)  # warm up

    pieces, encode_seconds = timed(encoder.push, list(values.split(config.hop_length, dim=-1)))
    (last,), flush_seconds = timed(lambda _: encoder.flush(), [values])
    (output,), whole_seconds = timed(lambda x: tokenizer.encode(x).audio_codes, [values])
    report("encode", encode_seconds, float(flush_seconds), float(whole_seconds), duration_s)
    streamed = torch.cat([*pieces, last], dim=-1)

    pieces, decode_seconds = timed(decoder.push, list(output.split(1, dim=-1)))
    (last,), flush_seconds = timed(lambda _: decoder.flush(), [values])
    (audio,), whole_seconds = timed(lambda x: tokenizer.decode(x).audio_values, [output])
    report("decode", decode_seconds, float(flush_seconds), float(whole_seconds), duration_s)
    difference = (torch.cat([*pieces, last], dim=-1) - audio).abs().max()
    agreement = (streamed == output).double().mean()
    print(f"codes equal in {100 * agreement:.2f} % of entries, waveforms within {difference:.1e}")


if __name__ == "__main__":
    main()
