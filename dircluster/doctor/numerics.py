"""Whether the device computes what the CPU computes in float64, and draws what the CPU draws."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import threat_of
from dircluster.defenses.base import Purifier
from dircluster.doctor.findings import Finding, at_least, at_most, largest, skipped
from dircluster.doctor.machine import Machine, drawn, relative, true_fp32
from dircluster.evaluation.victim import Masked
from dircluster.models.modules import under_attack
from dircluster.rng import Stream
from dircluster.training.stages import Networks, stages_of

Attention = Callable[..., Tensor]
"""Queries, keys and values (N, heads, T, D) -> (N, heads, T, D)."""
BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ABSENT = ("No available kernel", "No viable backend")
"""What PyTorch says where a device has no such kernel for a shape and type."""
IMAGES = 8
"""That pass through the networks where results are compared."""
ERRORS = {"fp32": (1e-4, 5e-3), "bf16": (5e-2, 0.5)}
"""Largest relative errors of outputs and of input gradients. An H100 has 3e-7 and 1e-4 in fp32, 9e-3 and 9e-2 in bf16;
TF32 in place of fp32 has 1e-3 and 3e-2 (docs/results.md)."""
LOSS = 0.9
"""Least share of the loss that attacks crafted in fp32 gain, which those in bf16 must gain. Both are judged in fp32."""
SIGNS = 0.9
"""Least share of input gradients whose sign bf16 keeps."""
ATTENTION_ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class _Shapes(TorchFunctionMode):
    """Notes the shapes of the queries that pass through scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[int, ...], None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.found[tuple(args[0].shape)] = None
        return func(*args, **(kwargs or {}))


def attention_shapes(purifier: Purifier, images: Tensor) -> list[tuple[int, ...]]:
    """Shapes (N, heads, T, D) of the attention that ``images`` pass through in a purifier, each once."""
    with _Shapes() as shapes, torch.no_grad():
        purifier(images, drawn(purifier, len(images), images.device))
    return list(shapes.found)


def attention_error(attend: Attention, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of output and gradients of an attention against its formula in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, onto = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    wide = [x.double().requires_grad_(True) for x in (q, k, v)]
    weights = (wide[0] @ wide[1].transpose(-2, -1) / shape[-1] ** 0.5).softmax(dim=-1)
    reference = weights @ wide[2]
    narrow = [x.to(device).requires_grad_(True) for x in (q, k, v)]
    made = attend(*narrow)
    gradients = torch.autograd.grad(made, narrow, onto.to(device))
    references = torch.autograd.grad(reference, wide, onto.double())
    return largest(map(relative, (made, *gradients), (reference, *references)))


def attention(machine: Machine, attend: Attention = F.scaled_dot_product_attention) -> Iterator[Finding]:
    """Every attention kernel of the device at the lengths that the run's purifier needs."""
    images = machine.pictures(2).pixels().to(machine.device)
    shapes = attention_shapes(machine.defended().purifier, images)
    if not shapes:
        yield skipped("attention", "the purifier calls no scaled_dot_product_attention")
    for shape in shapes:
        for dtype, most in ATTENTION_ERRORS.items():
            name = f"attention, T = {shape[2]}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
            errors, absent = {}, []
            for kernel, backend in BACKENDS.items():
                try:
                    with warnings.catch_warnings(action="ignore"), sdpa_kernel(backend), true_fp32():
                        errors[kernel] = attention_error(attend, shape, dtype, machine.device)
                except RuntimeError as error:
                    if not any(text in str(error) for text in ABSENT):
                        raise
                    absent.append(kernel)
            note = ", ".join([*(f"{kernel} {error:.1e}" for kernel, error in errors.items())])
            note += f"; none of {', '.join(absent)} here" if absent else ""
            yield at_most(name, largest(errors.values()), most, note=note)


def passed(g: nn.Module, h: nn.Module, images: Tensor, draws: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """g, h and h(g) of images and the gradients of each with respect to them, by name."""
    found: dict[str, Tensor] = {}
    onto = images.detach().flip(0) - 0.5  # some direction for the gradient of an image
    for name in ("g", "h", "h(g)"):
        asked = images.clone().requires_grad_(True)
        made = h(asked) if name == "h" else g(asked, draws).to(images.dtype)
        made = h(made) if name == "h(g)" else made
        value = (made * onto).mean() if name == "g" else F.cross_entropy(made.to(images.dtype), labels)
        (found[f"gradient of {name}"],) = torch.autograd.grad(value, asked)
        found[name] = made.detach()
    return found


def agreement(machine: Machine) -> Iterator[Finding]:
    """g, h and h(g) on the device, in fp32 and bf16, against float64 on the CPU."""
    split = machine.pictures(IMAGES)
    images, labels = split.pixels(), split.labels
    sound = machine.defended(machine.alone).double()
    draws = drawn(sound.purifier, IMAGES, images.device)
    reference = passed(sound.purifier, sound.classifier, images.double(), draws, labels)
    defense = machine.defended()
    here = (images.to(machine.device), None if draws is None else draws.to(machine.device), labels.to(machine.device))
    for precision, (outputs, gradients) in ERRORS.items():
        with true_fp32(), torch.autocast(machine.device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = passed(defense.purifier, defense.classifier, *here)
        for kind, most in (("", outputs), ("gradient of ", gradients)):
            errors = {name: relative(found[kind + name], reference[kind + name]) for name in ("g", "h", "h(g)")}
            note = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            yield at_most(f"{kind or 'output of '}g, h, h(g) in {precision}", largest(errors.values()), most, note=note)
    shares = {
        name: _same_signs(found[f"gradient of {name}"], reference[f"gradient of {name}"]) for name in ("h", "h(g)")
    }
    note = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    yield at_least("equal gradient signs in bf16", min(shares.values()), SIGNS, "of all", note)


def _same_signs(found: Tensor, reference: Tensor) -> float:
    return float((found.cpu().sign() == reference.cpu().sign()).double().mean())


def draws(machine: Machine) -> Iterator[Finding]:
    """All randomness of a step on the device, bit by bit against that of the CPU."""
    config, count = machine.config, min(machine.config.training.batch_size, 128)
    shape = (config.data.channels, config.data.height, config.data.width)
    networks = Networks(config, machine.alone)
    for stage in stages_of(config):
        recipe = stage.recipe(networks)
        made = []
        for device in (torch.device("cpu"), machine.device):
            stream = Stream(config.seed, 3, 1, count, slice(0, count), device, prefix=stage.name)
            made.append({name: value.cpu() for name, value in recipe.draws(stream, shape).items()})
        other = [name for name, value in made[0].items() if not torch.equal(value, made[1][name])]
        note = f"differ: {', '.join(other)}" if other else f"{', '.join(made[0])} of {count} images"
        yield at_most(f"draws of {stage.name} unlike the CPU's", float(len(other)), 0, note=note)
    purifier = networks.defense.defended(config, networks).purifier
    rows = drawn(purifier, count, machine.alone.device)
    if isinstance(purifier, Masked) and rows is not None:
        differ = (purifier.masks(rows) != purifier.masks(rows.to(machine.device)).cpu()).sum()
        yield at_most("masks unlike the CPU's", float(differ), 0, "patches", f"{count} images")


def predictions(machine: Machine, least: float = 0.9) -> Iterator[Finding]:
    """The share of images that h(g(x)) classifies in bf16 as in fp32, once h has seen a few batches, and the share of
    the loss gained by attacks that those crafted in bf16 gain.
    """
    count = 256 if machine.gpu else 96
    split = machine.pictures(count)
    images, labels = split.pixels().to(machine.device), split.labels.to(machine.device)
    defense = machine.defended()
    rows = drawn(defense.purifier, count, machine.device)
    with torch.no_grad():
        restored = defense.purifier(images, rows)
    _fit(defense.classifier, restored, labels)
    found = []
    for half in (False, True):
        with torch.no_grad(), true_fp32(), torch.autocast(machine.device.type, torch.bfloat16, enabled=half):
            found.append(defense.logits(images, rows).argmax(dim=1))
    share = float((found[0] == found[1]).double().mean())
    classes = len(set(found[0].tolist()))
    yield at_least("equal predictions in bf16", share, least, "of all", f"n = {count}, {classes} classes predicted")
    few = slice(64 if machine.gpu else 32)
    images, labels, rows = images[few], labels[few], None if rows is None else rows[few]
    settings = machine.config.attack

    def logits(candidates: Tensor) -> Tensor:
        return defense.logits(candidates, rows)

    with true_fp32(), under_attack(defense):
        attacked = [images]
        for half in (False, True):
            with torch.autocast(machine.device.type, torch.bfloat16, enabled=half):
                attacked.append(pgd(logits, images, labels, threat_of(settings), 3, settings.step_for(3)))
        with torch.no_grad():
            natural, whole, by_half = (float(F.cross_entropy(logits(each), labels)) for each in attacked)
    note = f"cross-entropy of {len(labels)} images: {natural:.3f}, {whole:.3f} under PGD-3, {by_half:.3f} in bf16"
    share = (by_half - natural) / (whole - natural) if whole > natural else 0.0
    yield at_least("what attacks in bf16 find", share, LOSS, "of fp32's", note)


def _fit(classifier: nn.Module, images: Tensor, labels: Tensor, steps: int = 60, seconds: float = 2.0) -> None:
    """Some steps on restored images, as many as there is time for, so that predictions differ from image to image."""
    parts = [part for part in classifier.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for part in parts:
        part.momentum = 0.5  # statistics follow within a few steps
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    classifier.train()
    ends = time.monotonic() + seconds
    for step in range(steps):
        if step > 5 and time.monotonic() > ends:
            break
        some = slice(32 * step % len(labels), 32 * step % len(labels) + 32)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(classifier(images[some]), labels[some]))
        optimizer.step()
    classifier.eval()
