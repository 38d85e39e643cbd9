"""The published LM-SPT layout written out once more, in plain torch functions over named tensors, as a second opinion.

`Published` evaluates a configuration of that layout; where it has no weights yet it draws them, which is how a test
gets a model of any size. Nothing of the project is used here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class Published:
    """A model in the published layout: a configuration and named tensors (drawn when first asked for)."""

    def __init__(self, config: dict, tensors: dict | None = None, seed: int = 0):
        self.config, self.drawn = config, tensors is None
        self.tensors = {} if tensors is None else tensors
        self.generator = torch.Generator().manual_seed(seed)
        self.causal = bool(config.get("is_causal"))

    def get(self, name, *shape, low=None, high=None):
        if self.drawn and name not in self.tensors:
            if low is None:
                self.tensors[name] = torch.randn(shape, generator=self.generator)
            else:
                self.tensors[name] = low + (high - low) * torch.rand(shape, generator=self.generator)
        tensor = self.tensors[name]
        assert tuple(tensor.shape) == shape, name
        return tensor

    def weight(self, name, out, inside, taps, gain=1.0):
        """Weight norm over the first dimension, and the bias of `bias` channels."""
        g = self.get(f"{name}.weight_g", out, 1, 1, low=0.8 * gain, high=1.2 * gain)
        v = self.get(f"{name}.weight_v", out, inside, taps)
        return g * v / v.square().sum(dim=(1, 2), keepdim=True).sqrt()

    def snake(self, name, x):
        alpha = self.get(f"{name}.alpha", 1, x.shape[1], 1, low=0.5, high=2.0)
        return x + (alpha * x).sin().square() / (alpha + 1e-9)

    def conv(self, name, x, out, taps, stride=1, dilation=1, gain=1.0):
        name = f"{name}.conv" if self.causal else name
        weight = self.weight(name, out, x.shape[1], taps, gain)
        bias = self.get(f"{name}.bias", out, low=-0.1, high=0.1)
        reach = (taps - 1) * dilation + 1
        if self.causal:
            x = F.pad(x, (reach - stride, -x.shape[-1] % stride))
            return F.conv1d(x, weight, bias, stride, 0, dilation)
        return F.conv1d(x, weight, bias, stride, math.ceil(stride / 2) if stride > 1 else reach // 2, dilation)

    def up(self, name, x, out, stride):
        name = f"{name}.conv" if self.causal else name
        weight = self.weight(name, x.shape[1], out, 2 * stride, gain=math.sqrt(stride / 2))
        bias = self.get(f"{name}.bias", out, low=-0.1, high=0.1)
        if self.causal:
            return F.conv_transpose1d(x, weight, bias, stride)[..., :-stride]
        return F.conv_transpose1d(x, weight, bias, stride, math.ceil(stride / 2))

    def unit(self, name, x, dilation):
        y = self.conv(f"{name}.block.1", self.snake(f"{name}.block.0", x), x.shape[1], 7, dilation=dilation)
        return x + self.conv(f"{name}.block.3", self.snake(f"{name}.block.2", y), x.shape[1], 1, gain=0.3)

    def encoder(self, name, x, width):
        x = self.conv(f"{name}.block.0", x, width, 7)
        rates = self.config["encoder_rates"]
        for index, stride in enumerate(rates, start=1):
            block = f"{name}.block.{index}"
            for unit, dilation in enumerate((1, 3, 9)):
                x = self.unit(f"{block}.block.{unit}", x, dilation)
            width *= 2
            x = self.conv(f"{block}.block.4", self.snake(f"{block}.block.3", x), width, 2 * stride, stride)
        x = self.snake(f"{name}.block.{len(rates) + 1}", x)
        return self.conv(f"{name}.block.{len(rates) + 2}", x, self.config["latent_dim"], 3)

    def decoder(self, name, x, width, rates):
        x = self.conv(f"{name}.model.0", x, width, 7)
        for index, stride in enumerate(rates, start=1):
            block, width = f"{name}.model.{index}", width // 2
            x = self.up(f"{block}.block.1", self.snake(f"{block}.block.0", x), width, stride)
            for unit, dilation in enumerate((1, 3, 9), start=2):
                x = self.unit(f"{block}.block.{unit}", x, dilation)
        x = self.snake(f"{name}.model.{len(rates) + 1}", x)
        return self.conv(f"{name}.model.{len(rates) + 2}", x, 1, 7, gain=0.3).tanh()

    def book(self, index):
        """(projection in, its bias, entries, projection out, its bias) of one book."""
        kind = "acoustic" if index else "semantic"
        name = f"quantizer.rvq_rest.quantizers.{index - 1}" if index else "quantizer.rvq_first.quantizers.0"
        size, dim = self.config[f"{kind}_codebook_size"], self.config[f"{kind}_codebook_dim"]
        latent = self.config["latent_dim"]
        return (
            self.weight(f"{name}.in_proj", dim, latent, 1),
            self.get(f"{name}.in_proj.bias", dim, low=-0.1, high=0.1),
            self.get(f"{name}.codebook.weight", size, dim),
            self.weight(f"{name}.out_proj", latent, dim, 1),
            self.get(f"{name}.out_proj.bias", latent, low=-0.1, high=0.1),
        )

    def quantize(self, x, index):
        weight, bias, entries, _, _ = self.book(index)
        seen = F.normalize(F.conv1d(x, weight, bias), dim=1)
        codes = torch.einsum("bdt,nd->btn", seen, F.normalize(entries, dim=1)).argmax(dim=-1)
        return codes, self.look_up(codes, index)

    def look_up(self, codes, index):
        _, _, entries, weight, bias = self.book(index)
        return F.conv1d(entries[codes].transpose(1, 2), weight, bias)

    def encode(self, audio):
        """(K, B, F) of (B, 1, S)."""
        config, shared = self.config, self.config["use_shared_encoder"]
        semantic = self.encoder("semantic_encoder", audio, config["encoder_dim"])
        rest = semantic if shared else self.encoder("acoustic_encoder", audio, config["encoder_dim"])
        books = [self.quantize(semantic, 0)]
        if config["semantic_subtraction"]:
            rest = rest - books[0][1]
        for index in range(1, config["n_codebooks"]):
            books.append(self.quantize(rest, index))
            rest = rest - books[-1][1]
        if self.drawn:
            for kind, n in (("semantic", 1), ("acoustic", config["n_codebooks"] - 1)):
                self.get(f"quantizer.{kind}_vocab_usage", n, config[f"{kind}_codebook_size"], low=0.0, high=1e-3)
        return torch.stack([codes for codes, _ in books])

    def decode(self, codes):
        """(B, 1, S) of (k, B, F)."""
        latents = sum(self.look_up(book, index) for index, book in enumerate(codes))
        return self.decoder("decoder", latents, self.config["decoder_dim"], self.config["decoder_rates"])

    def resynthesize(self, codes):
        """(B, 1, S') of (k, B, F): book 0 through the auxiliary decoder."""
        sizes = self.config["aux_decoder"]
        return self.decoder("aux_decoder", self.look_up(codes[0], 0), sizes["channels"], sizes["rates"])
