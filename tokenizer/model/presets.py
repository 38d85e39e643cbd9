"""The sizes of the named tokenizers: what each preset sets beside LMSPTConfig's defaults.

`nano-*` are ours: small enough to train and run on a CPU; `nano-*-causal` stream. `micro-*` are half of that, and
`mini-*` lie between, with their depth at the frame rate, where it costs least: the sizes of the embedded tokenizers.
`release-12.5hz` is the published model (kakaocorp/lmspt, configuration `lmspt_12d5hz_16384_4096_8vq`). `paper-*` follow
arXiv 2506.16738 v1; what v1 does not state is marked `inferred` and brings the tokenizer, auxiliary decoder included,
within 3 % of v1's 99.7 M parameters.
`docs/tokenizer-presets.md` counts them.
"""

from __future__ import annotations

from typing import Any

# v1 states: 16 kHz, two encoders of four convolution blocks and an 8-layer transformer of width 512, a Vocos decoder of
# 12 layers of width 768, an auxiliary 1-layer Vocos of 2.4 M parameters, one semantic and seven acoustic books.
_PAPER: dict[str, Any] = {
    "encoder_architecture": "dac",
    "latent_dim": 512,
    "semantic_encoder_width": 28,  # inferred: doubles at each of the four strides
    "semantic_encoder_layers": 8,
    "acoustic_encoder_width": 28,  # inferred
    "acoustic_encoder_layers": 8,
    "codebook_sizes": [2048] * 8,  # v1 tries 1024, 2048 and 4096
    "codebook_dim": 8,  # inferred from the published configuration
    "n_fft": 1280,  # inferred: two hops of 20 ms at either decoder's output
    "decoder_width": 768,
    "decoder_layers": 0,
    "auxiliary_decoder_layers": 0,
    "expansion": 3,  # inferred: Vocos's own ratio; 4 in the encoders would come to 112 M
    "head_dim": 64,  # inferred
}

# About 3.9 M parameters at each rate: 8 MB in fp16.
_MICRO: dict[str, Any] = {
    "latent_dim": 160,
    "codebook_sizes": [1024] + [2048] * 7,
    "semantic_encoder_width": 160,
    "acoustic_encoder_width": 128,
    "decoder_width": 192,
    "decoder_layers": 1,
    "auxiliary_decoder_width": 96,
    "head_dim": 32,
}

# The same widths with more layers at the frame rate: about 5.8 M parameters. Semantic books as large as the paper's at
# each rate: an entry has more to say where frames are fewer.
_MINI = _MICRO | {"semantic_encoder_layers": 4, "acoustic_encoder_layers": 3, "decoder_layers": 3}

PRESETS: dict[str, dict[str, Any]] = {
    "micro-25hz": _MICRO
    | {
        "strides": [160, 4],
        "semantic_encoder_depths": [0, 2],
        "acoustic_encoder_depths": [1, 1],
        "decoder_depths": [4, 0],
        "auxiliary_decoder_depths": [2, 1],
        "attention_window": 32,
    },
    "micro-12.5hz": _MICRO
    | {
        "strides": [160, 4, 2],
        "semantic_encoder_depths": [0, 1, 0],
        "acoustic_encoder_depths": [1, 1, 0],
        "decoder_depths": [4, 0, 0],
        "auxiliary_decoder_depths": [2, 1, 0],
        "attention_window": 16,
    },
    "micro-6.25hz": _MICRO
    | {
        "strides": [160, 4, 4],
        "semantic_encoder_depths": [0, 1, 0],
        "semantic_encoder_layers": 1,
        "acoustic_encoder_depths": [1, 1, 0],
        "decoder_depths": [4, 0, 0],
        "auxiliary_decoder_depths": [2, 1, 0],
        "attention_window": 8,
    },
    "mini-25hz": _MINI
    | {
        "strides": [160, 4],
        "codebook_sizes": [1024] + [2048] * 7,
        "semantic_encoder_depths": [0, 3],
        "acoustic_encoder_depths": [1, 1],
        "decoder_depths": [4, 0],
        "auxiliary_decoder_depths": [2, 1],
        "attention_window": 32,
    },
    "mini-12.5hz": _MINI
    | {
        "strides": [160, 4, 2],
        "codebook_sizes": [2048] * 8,
        "semantic_encoder_depths": [0, 3, 0],
        "acoustic_encoder_depths": [1, 1, 0],
        "decoder_depths": [4, 0, 0],
        "auxiliary_decoder_depths": [2, 1, 0],
        "attention_window": 16,
    },
    "mini-6.25hz": _MINI
    | {
        "strides": [160, 4, 4],
        "codebook_sizes": [4096] + [2048] * 7,
        "semantic_encoder_depths": [0, 3, 0],
        "acoustic_encoder_depths": [1, 1, 0],
        "acoustic_encoder_layers": 2,
        "decoder_depths": [4, 0, 0],
        "auxiliary_decoder_depths": [2, 1, 0],
        "attention_window": 8,
    },
    "nano-25hz": {
        "strides": [160, 4],
        "semantic_encoder_depths": [0, 3],
        "acoustic_encoder_depths": [0, 2],
        "decoder_depths": [3, 1],
        "auxiliary_decoder_depths": [2, 1],
        "attention_window": 32,
    },
    "nano-12.5hz": {
        "strides": [160, 4, 2],
        "semantic_encoder_depths": [0, 2, 0],
        "acoustic_encoder_depths": [0, 2, 0],
        "decoder_depths": [3, 1, 0],
        "auxiliary_decoder_depths": [2, 1, 0],
        "attention_window": 16,
    },
    "nano-6.25hz": {
        "strides": [160, 4, 4],
        "semantic_encoder_depths": [0, 2, 0],
        "acoustic_encoder_depths": [0, 2, 0],
        "decoder_depths": [3, 1, 0],
        "auxiliary_decoder_depths": [2, 1, 0],
        "attention_window": 8,
    },
    "release-12.5hz": {
        "sampling_rate": 24_000,
        "strides": [4, 5, 6, 8, 2],
        "encoder_architecture": "dac",
        "decoder_architecture": "dac",
        "auxiliary_decoder_architecture": "dac",
        "latent_dim": 1024,
        "semantic_encoder_width": 32,
        "semantic_encoder_layers": 0,
        "acoustic_encoder_width": 32,
        "acoustic_encoder_layers": 0,
        "decoder_width": 1536,
        "decoder_layers": 0,
        "auxiliary_sampling_rate": 16_000,
        "auxiliary_strides": [4, 5, 8, 8],
        "auxiliary_decoder_width": 128,
        "auxiliary_decoder_layers": 0,
        "codebook_sizes": [16_384] + [4096] * 7,
        "codebook_dim": 8,
        "exact_lengths": False,
    },
    # The strides, and the resolutions at which the Vocos blocks stand (50 Hz for all rates), are inferred.
    "paper-25hz": _PAPER
    | {
        "strides": [4, 4, 5, 8],
        "decoder_strides": [320, 2],
        "decoder_depths": [12, 0],
        "auxiliary_strides": [320, 2],
        "auxiliary_decoder_depths": [1, 0],
        "auxiliary_decoder_width": 384,
        "attention_window": 32,
    },
    "paper-12.5hz": _PAPER
    | {
        "strides": [4, 5, 8, 8],
        "decoder_strides": [320, 2, 2],
        "decoder_depths": [12, 0, 0],
        "auxiliary_strides": [320, 2, 2],
        "auxiliary_decoder_depths": [1, 0, 0],
        "auxiliary_decoder_width": 384,
        "attention_window": 16,
    },
    "paper-6.25hz": _PAPER
    | {
        "strides": [5, 8, 8, 8],
        "decoder_strides": [320, 2, 2, 2],
        "decoder_depths": [12, 0, 0, 0],
        "auxiliary_strides": [320, 8],
        "auxiliary_decoder_depths": [1, 0],
        "auxiliary_decoder_width": 320,
        "attention_window": 8,
    },
}

# The same sizes with nothing read of the future, for streaming.
PRESETS |= {f"{name}-causal": sizes | {"causal": True} for name, sizes in PRESETS.items() if name.startswith("nano-")}
