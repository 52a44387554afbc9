"""The masked auto-encoder, against a plain float64 reading of its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor

from dircluster import rng
from dircluster.models.masked_vit import MaskedDenoiser, patchify, unpatchify
from dircluster.models.masking import complementary_masks, random_permutations
from dircluster.models.transformer import Block
from dircluster.presets.dir import MaskingConfig, ModelConfig

TINY = ModelConfig(patch=2, width=16, heads=2, encoder_depth=2, decoder_depth=1)


def make(config: ModelConfig = TINY, channels: int = 3, height: int = 8, width: int = 8) -> MaskedDenoiser:
    with rng.seeded_torch_rng(0, "test"):
        return MaskedDenoiser(config, channels, height, width).double()


def plain_block(block: Any, x: Tensor) -> Tensor:
    """A pre-norm transformer block, written out: (n, D) -> (n, D)."""

    def norm(layer: Any, v: Tensor) -> Tensor:
        centered = v - v.mean(-1, keepdim=True)
        return centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + layer.eps) * layer.weight + layer.bias

    heads, dim = block.attn.num_heads, x.shape[1]
    qkv = norm(block.norm1, x) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    out = []
    for head in range(heads):
        size = dim // heads
        q, k, v = (qkv[:, i * dim + head * size : i * dim + (head + 1) * size] for i in range(3))
        out.append(torch.softmax(q @ k.T / math.sqrt(size), dim=-1) @ v)
    x = x + torch.cat(out, dim=1) @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = norm(block.norm2, x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def plain_restore(g: MaskedDenoiser, image: Tensor, kept: Tensor) -> Tensor:
    """One image under one mask, token by token: (C, H, W), (n,) -> (C, H, W)."""
    p, columns = g.config.patch, g.width // g.config.patch
    places = [(t // columns * p, t % columns * p) for t in range(g.tokens)]
    tokens = [g.class_token[0, 0] + g.encoder_position[0, 0]]
    for t in kept.tolist():
        r, c = places[t]
        pixels = image[:, r : r + p, c : c + p].reshape(-1)
        tokens.append(g.embed.weight @ pixels + g.embed.bias + g.encoder_position[0, 1 + t])
    x = torch.stack(tokens)
    for block in g.encoder:
        x = plain_block(block, x)
    x = g.encoder_norm(x)
    full = [x[0] + g.decoder_position[0, 0]]
    for t in range(g.tokens):
        token = x[1 + kept.tolist().index(t)] if t in kept.tolist() else g.mask_token[0, 0]
        full.append(token + g.decoder_position[0, 1 + t])
    y = torch.stack(full)
    for block in g.decoder:
        y = plain_block(block, y)
    y = g.decoder_norm(y)[1:]
    restored = torch.zeros_like(image)
    for t, (r, c) in enumerate(places):
        pixels = g.head.weight @ y[t] + g.head.bias
        restored[:, r : r + p, c : c + p] = pixels.reshape(image.shape[0], p, p)
    return restored


@pytest.mark.parametrize(("ratio", "masks"), [(0.5, 2), (0.7, 4)])
def test_it_is_the_definition(ratio: float, masks: int) -> None:
    g = make().eval()
    with torch.no_grad():
        for parameter in g.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng.generator(1, "p"), dtype=torch.float64))
        images = torch.rand(3, 3, 8, 8, generator=rng.generator(0, "x"), dtype=torch.float64)
        kept = complementary_masks(random_permutations(rng.generator(0, "m"), 3, 16), MaskingConfig(ratio=ratio))
        each = g.restore_each(images, kept)
        for k in range(masks):
            for n in range(3):
                expected = plain_restore(g, images[n], kept[k, n])
                torch.testing.assert_close(each[k, n].double(), expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(g(images, kept), each.mean(dim=0))


def test_the_papers_size() -> None:
    def parameters(**changes: Any) -> int:
        return sum(p.numel() for p in MaskedDenoiser(ModelConfig(**changes), 3, 32, 32).parameters())

    assert parameters() == 4_553_292  # METHOD: about 4.55 M with the linear head
    assert parameters(head="token_mixing") - parameters() == pytest.approx(1.05e6, rel=0.01)


def test_only_kept_pixels_matter() -> None:
    g = make().eval()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    kept = complementary_masks(random_permutations(rng.generator(0, "m"), 2, 16), MaskingConfig())[:1]
    images.requires_grad_(True)
    g.restore_each(images, kept).square().sum().backward()
    moved = patchify(images.grad, 2).abs().sum(dim=2) > 0
    for n in range(2):
        assert moved[n].nonzero().flatten().tolist() == sorted(kept[0, n].tolist())


@pytest.mark.parametrize("head", ["linear", "token_mixing"])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 8, 12), (2, 4, 16)])
def test_any_size_and_channels(head: Any, channels: int, height: int, width: int) -> None:
    config = ModelConfig(patch=2, width=24, heads=2, encoder_depth=1, decoder_depth=1, head=head)
    g = make(config, channels, height, width)
    kept = complementary_masks(random_permutations(rng.generator(0, "m"), 2, g.tokens), MaskingConfig(ratio=0.7))
    assert g(torch.rand(2, channels, height, width, dtype=torch.float64), kept).shape == (2, channels, height, width)


def test_token_mixing_mixes_all_tokens() -> None:
    config = ModelConfig(patch=2, width=24, heads=2, encoder_depth=1, decoder_depth=1, head="token_mixing")
    head = make(config).head
    tokens = torch.rand(1, 16, 24, dtype=torch.float64, requires_grad=True)
    head(tokens)[0, 0].sum().backward()
    assert (tokens.grad.abs().sum(dim=2) > 0).all()


def test_every_parameter_learns() -> None:
    g = make()
    kept = complementary_masks(random_permutations(rng.generator(0, "m"), 2, 16), MaskingConfig())
    g(torch.rand(2, 3, 8, 8, dtype=torch.float64), kept).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in g.parameters())


def test_patches_are_in_reading_order() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert patchify(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(unpatchify(patchify(image, 2), 2, 1, 4, 4), image)


def test_a_block_is_that_of_timm_to_the_bit() -> None:
    with rng.seeded_torch_rng(0, "test"):
        ours = Block(48, 4, 4.0)
    with rng.seeded_torch_rng(0, "test"):
        theirs = TimmBlock(48, 4, mlp_ratio=4.0, qkv_bias=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    tokens = torch.randn(3, 9, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    made = [(out := block(tokens), torch.autograd.grad(out.square().sum(), tokens)[0]) for block in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
