"""The denoiser g: a masked auto-encoder of ViT blocks that restores an image from the patches a mask keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dircluster.models.modules import begin, passed
from dircluster.models.precision import WholeConv1d, WholeLinear
from dircluster.models.transformer import Block
from dircluster.presets.dir import ModelConfig


def patchify(images: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) -> (N, T, C*p*p), patches in reading order."""
    n, c, h, w = images.shape
    grid = images.reshape(n, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(patches: Tensor, patch: int, channels: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patchify`: (N, T, C*p*p) -> (N, C, H, W)."""
    grid = patches.reshape(-1, height // patch, width // patch, channels, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


class TokenMixingHead(nn.Module):
    """The released code's head: a convolution over the width in which every output patch mixes all T tokens."""

    def __init__(self, tokens: int, width: int, pixels: int) -> None:
        super().__init__()
        stride = width // pixels
        self.mix = WholeConv1d(tokens, tokens, kernel_size=stride, stride=stride)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, C*p*p)."""
        mixed: Tensor = self.mix(tokens)
        return mixed


class MaskedDenoiser(nn.Module):
    """g of the paper. Only kept tokens are encoded; every output patch comes from the decoder, and is not clamped.

    ``height`` and ``width`` are pixels and multiples of ``config.patch``; the two position tables are learned.
    """

    def __init__(self, config: ModelConfig, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.channels, self.height, self.width = channels, height, width
        self.image_shape: tuple[int, int, int] | None = channels, height, width
        self.tokens = (height // config.patch) * (width // config.patch)
        dim, pixels = config.width, channels * config.patch**2

        def blocks(depth: int) -> nn.Sequential:
            return nn.Sequential(*(Block(dim, config.heads, config.mlp_ratio) for _ in range(depth)))

        self.embed = WholeLinear(pixels, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.encoder_position = nn.Parameter(torch.zeros(1, self.tokens + 1, dim))
        self.decoder_position = nn.Parameter(torch.zeros(1, self.tokens + 1, dim))
        self.encoder = blocks(config.encoder_depth)
        self.encoder_norm = nn.LayerNorm(dim)
        self.decoder = blocks(config.decoder_depth)
        self.decoder_norm = nn.LayerNorm(dim)
        self.recompute = False
        """Whether activations of blocks are computed again in the backward pass instead of being kept."""
        self.head = WholeLinear(dim, pixels) if config.head == "linear" else TokenMixingHead(self.tokens, dim, pixels)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.class_token, self.mask_token, self.encoder_position, self.decoder_position):
            begin(nn.init.normal_, table, std=0.02)

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """The restored image x~ of Eq. 5, the mean over the masks: (N, C, H, W), (K, N, n) -> (N, C, H, W)."""
        return self.restore_each(images, kept).mean(dim=0)

    def restore_each(self, images: Tensor, kept: Tensor) -> Tensor:
        """g(x' m_k) for each mask, all K in one call: (N, C, H, W), (K, N, n) -> (K, N, C, H, W)."""
        count, n, size = kept.shape
        position = self.encoder_position
        tokens = self.embed(patchify(images, self.config.patch)) + position[:, 1:]
        rows = kept + torch.arange(n, device=kept.device)[None, :, None] * self.tokens
        seen = tokens.reshape(n * self.tokens, -1)[rows.reshape(-1)].reshape(count * n, size, -1)
        first = (self.class_token + position[:, :1]).expand(count * n, -1, -1)
        given = torch.cat([first.to(seen.dtype), seen], dim=1)
        encoded = self.encoder_norm(passed(self.encoder, given, self.recompute))

        positions = kept.reshape(count * n, size) + torch.arange(count * n, device=kept.device)[:, None] * self.tokens
        unseen = self.mask_token.to(encoded.dtype).expand(count * n, self.tokens, -1)
        full = unseen.reshape(count * n * self.tokens, -1).index_copy(
            0, positions.reshape(-1), encoded[:, 1:].reshape(count * n * size, -1)
        )
        full = torch.cat([encoded[:, :1], full.reshape(count * n, self.tokens, -1)], dim=1) + self.decoder_position
        decoded = self.decoder_norm(passed(self.decoder, full, self.recompute))[:, 1:]
        pixels = self.head(decoded)
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        restored = unpatchify(pixels, self.config.patch, self.channels, self.height, self.width)
        return restored.reshape(count, n, self.channels, self.height, self.width)
