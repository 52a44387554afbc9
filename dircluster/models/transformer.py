"""The transformer block: pre-normalization, multi-head self-attention, an MLP (Vaswani et al. 2017; Xiong et al. 2020).

It computes what ``timm.models.vision_transformer.Block`` does, with its names of weights: importing timm takes longer
than importing torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dircluster.models.precision import outside_autocast

EPS = 1e-6
"""Added to the variance in a normalization, as timm's blocks have it."""


class Attention(nn.Module):
    """Self-attention of ``heads`` heads over the tokens of each row."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        n, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed: Tensor = self.proj(_attend(q, k, v).transpose(1, 2).reshape(n, tokens, dim))
        return mixed


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (N, heads, T, d) each, -> the same.

    bf16 on a CPU is computed in fp32: there its backward pass took eight times as long (docs/results.md).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    with outside_autocast(q.device):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        made: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return made


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). ``dim`` is a multiple of ``heads``."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        x = x + self.attn(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed
