"""CIFAR-10 on one GPU in ten minutes: a first DIR defense.

    python infra/gpu/cifar10.py --data FOLDER --out FOLDER --seconds 520

``--data`` holds parquet files train*, test*. It trains a target, a denoiser and DIR within the seconds given, rounds
each to bf16 when its stage ends (so that what is judged is what is kept), and judges it on 1,000 test images. It draws
on the device and schedules by the clock, which the ordinary training loop does not do. ``--rehearse`` runs the whole on
a few images with small models. Whether the GPU computes rightly and fast, ``jobs/doctor.py`` tells. It needs torch,
torchvision, pyarrow, scikit-learn and pyautoattack, and neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyautoattack  # noqa: F401  # of the judging: found missing now, and not after eight minutes
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dircluster
from dircluster.attacks.gradient import pgd
from dircluster.attacks.threat import LInf
from dircluster.config import AttackConfig, DataConfig, EvaluationConfig, TargetConfig
from dircluster.data.augment import crop
from dircluster.data.sources import load
from dircluster.data.split import Split
from dircluster.defenses.base import Defended
from dircluster.defenses.dir import DirRecipe, MaskedPurifier, PretrainRecipe
from dircluster.defenses.target import TargetRecipe
from dircluster.models import classifiers
from dircluster.models.classifiers import BasicBlock
from dircluster.models.modules import frozen
from dircluster.models.precision import OutsideAutocast
from dircluster.models.transformer import Block
from dircluster.presets.dir import DirConfig, MaskingConfig, ModelConfig

EPSILON = 8 / 255
DATA = DataConfig(name="cifar10", height=32, width=32, channels=3, crop_padding=4, flip=True)
PAPER = AttackConfig(epsilon=EPSILON)
"""PGD-5 of 2/255."""
HALF = AttackConfig(epsilon=EPSILON, training_step_size=EPSILON / 2, steps=3)
"""PGD-3 of 4/255."""
FAST = replace(HALF, crafting="target_first")
"""The same on the target alone, then one step on the whole pipeline."""
IN_TWO = DirConfig(perturb_steps=2, perturb_step_size=EPSILON / 2)
"""Eq. 4 in two steps of 4/255."""
BEGAN = time.monotonic()


def say(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", flush=True)


class Draws:
    """What recipes draw from, on the device: one row an image."""

    step = 0

    def __init__(self, generator: torch.Generator, rows: int) -> None:
        self.generator, self.rows = generator, rows

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand((self.rows, *shape), generator=self.generator, device=self.generator.device)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal."""
        return torch.randn((self.rows, *shape), generator=self.generator, device=self.generator.device)

    def sample(self, purpose: str, draw: Callable[[torch.Generator, int], Tensor | None]) -> Tensor | None:
        """What ``draw`` makes for the rows."""
        return draw(self.generator, self.rows)


class Machine:
    """The device, how models are made for it, and what a step of training is."""

    def __init__(self, rehearse: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.gpu, self.rehearse = self.device.type == "cuda", rehearse
        self.model = ModelConfig() if not rehearse else ModelConfig(width=24, heads=3, encoder_depth=1, decoder_depth=1)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.masking = MaskingConfig()
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.suppress_errors = True  # a block that cannot be compiled runs as it is
        if self.gpu:
            torch.backends.cudnn.benchmark = True
            tf32(True)

    def autocast(self, enabled: bool = True) -> Any:
        """bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled and self.gpu)

    def target(self, compiled: bool) -> nn.Module:
        """ResNet-18 with seeded weights, its first and last layer in fp32."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            made = classifiers.build("small_cnn" if self.rehearse else "resnet18", DATA)
        made = made.to(self.device, memory_format=torch.channels_last)
        if compiled:
            compile_blocks(made, BasicBlock)
        return made

    def frozen_target(self, h: nn.Module, compiled: bool) -> nn.Module:
        """``h`` for use alone, in place: its convolutions' weights in bf16, so that autocast need not cast them."""
        h.requires_grad_(False).eval()
        for part in h.modules():
            if self.gpu and isinstance(part, nn.Conv2d) and not isinstance(part, OutsideAutocast):
                part.weight.data = part.weight.data.to(torch.bfloat16)
        if compiled:
            compile_blocks(h, BasicBlock)
        return h

    def denoiser(self, compiled: bool) -> MaskedPurifier:
        """The paper's g with seeded weights, patch embedding and head in fp32."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(2)
            made = MaskedPurifier(self.model, self.masking, 3, 32, 32)
        made = made.to(self.device)
        if compiled:
            compile_blocks(made, Block)
        return made

    def batches(self, split: Split, size: int) -> Iterator[tuple[Tensor, Tensor, Draws]]:
        """Augmented batches without end, each epoch in a new order."""
        images, labels = split.images.to(self.device), split.labels.to(self.device)
        size = min(size, len(labels))
        while True:
            order = torch.randperm(len(labels), generator=self.generator, device=self.device)
            for rows in order.split(size):
                if len(rows) < size:
                    break
                draws = Draws(self.generator, size)
                offsets = (draws.uniform("crop", (2,)) * 9).long()
                some = crop(images[rows], offsets, 4)
                some = torch.where(draws.uniform("flip", (1, 1, 1)) < 0.5, some.flip(3), some)
                yield some.float() / 255, labels[rows], draws

    def wait(self) -> float:
        """The time once the device is done."""
        if self.gpu:
            torch.cuda.synchronize()
        return time.monotonic()


def compile_blocks(model: nn.Module, kind: type[nn.Module]) -> None:
    """Compile every block of ``kind`` by itself: instances share their graphs."""
    for part in model.modules():
        if isinstance(part, kind):
            part.compile(dynamic=False)


def tf32(on: bool) -> None:
    """Products and convolutions in TF32, or in true fp32."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def step(machine: Machine, recipe: Any, given: Any, optimizer: torch.optim.Optimizer, clip: float | None) -> Tensor:
    """One update: -> the loss, left on the device."""
    recipe.train()
    with machine.autocast():
        loss = recipe(recipe.attack(recipe.batch(*given)))["loss"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()
    return loss.detach()


def adamw(machine: Machine, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW with MAE's second beta."""
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=machine.gpu)


# ------------------------------------------------------------------------------------------------------- the training


class Stop(Exception):
    """A signal asks to stop."""


@contextmanager
def averaged(module: nn.Module, decay: float) -> Iterator[Callable[[], nn.Module]]:
    """A running mean of a module's weights and buffers: yields what updates it and returns the twin."""
    twin = copy.deepcopy(module)  # its blocks stay uncompiled
    pairs = [(a, b) for a, b in zip(twin.state_dict().values(), module.state_dict().values(), strict=True)]
    floats = [(a, b) for a, b in pairs if a.is_floating_point()]
    whole = [(a, b) for a, b in pairs if not a.is_floating_point()]

    def update() -> nn.Module:
        with torch.no_grad():
            torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
            for a, b in whole:
                a.copy_(b)
        return twin

    yield update


def round_to_bf16(module: nn.Module) -> None:
    """Every weight and statistic to its nearest bf16 value, kept in fp32."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(torch.bfloat16))


def keep(module: nn.Module, out: Path, name: str, parts: int = 1) -> None:
    """Write a module's tensors as bf16, in ``parts`` files."""
    tensors = {k: v.detach().cpu() for k, v in module.state_dict().items()}
    tensors = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in tensors.items()}
    items, size = sorted(tensors.items()), sum(v.numel() for v in tensors.values())
    files: list[dict[str, Tensor]] = [{} for _ in range(parts)]
    done = 0
    for key, value in items:
        files[min(parts - 1, parts * done // max(size, 1))][key] = value.contiguous()
        done += value.numel()
    for number, group in enumerate(files):
        save_file(group, out / (f"{name}.safetensors" if parts == 1 else f"{name}-{number + 1}.safetensors"))


class Training:
    """Target, pre-training, DIR by the clock."""

    def __init__(self, machine: Machine, train: Split, held_out: Split, out: Path, seconds: float, eager: bool) -> None:
        self.compiled = machine.gpu and not eager
        self.machine, self.train, self.out, self.seconds = machine, train, out, seconds
        self.held_out = held_out.take(slice(32 if machine.rehearse else 1000))
        self.size = 16 if machine.rehearse else 256
        self.steps_an_epoch = len(train) // min(self.size, len(train))
        self.report: dict[str, Any] = {"batch": self.size, "steps an epoch": self.steps_an_epoch, "curves": {}}
        self.asked = 0
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "asked", number))

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.monotonic() - BEGAN)

    def fit(
        self,
        name: str,
        recipe: Any,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        epochs: float,
        rate: Callable[[float], float],
        clip: float | None,
        decay: float,
        judged: Callable[[nn.Module], dict[str, float]],
        every: float,
        checkpoint: Callable[[nn.Module], None] = lambda module: None,
    ) -> nn.Module:
        """Train for ``epochs``; -> the running mean of the weights. ``rate`` maps the share done to a factor."""
        machine, batches = self.machine, self.machine.batches(self.train, self.size)
        steps = max(2, round(epochs * self.steps_an_epoch))
        base = [group["lr"] for group in optimizer.param_groups]
        curve: list[dict[str, float]] = []
        total, began, judging = torch.zeros((), device=machine.device), machine.wait(), 0.0
        last, since = time.monotonic(), 0
        with averaged(trained, decay) as update:
            for index in range(steps):
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * rate((index + 1) / steps)
                total += step(machine, recipe, next(batches), optimizer, clip)
                twin = update()
                since += 1
                done = index + 1
                if done % max(1, round(every * self.steps_an_epoch)) == 0 or done == steps:
                    now = machine.wait()
                    point = {"epoch": done / self.steps_an_epoch, "loss": float(total) / since}
                    if not math.isfinite(point["loss"]):
                        raise RuntimeError(f"{name}: the loss is not finite at step {done}")
                    point |= {"images/s": since * self.size / (now - last)}
                    point |= judged(twin)
                    curve.append(point)
                    say(f"{name}: " + ", ".join(f"{k} {v:.4g}" for k, v in point.items()))
                    total, since = torch.zeros_like(total), 0
                    checkpoint(twin)
                    judging += machine.wait() - now
                    last = machine.wait()
                if self.asked:
                    checkpoint(twin)
                    raise Stop(f"signal {self.asked}")
        spent = machine.wait() - began
        self.report["curves"][name] = curve
        self.report[name] = {"epochs": steps / self.steps_an_epoch, "steps": steps, "seconds": spent}
        self.report[name] |= {"of which judging": judging, "images/s": steps * self.size / (spent - judging)}
        say(f"{name}: {json.dumps(self.report[name])}")
        return twin

    def run(self) -> tuple[nn.Module, MaskedPurifier]:
        """All three stages: -> target and denoiser, rounded to bf16, uncompiled."""
        machine, small = self.machine, self.machine.rehearse
        compiled = self.compiled
        h = machine.target(compiled)
        sgd = torch.optim.SGD(h.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True)
        mean = self.fit(
            "target",
            TargetRecipe(h, TargetConfig(), PAPER),
            h,
            sgd,
            0.3 if small else 24,
            lambda share: min(share / 0.3, (1 - share) / 0.7),  # one cycle, linear up and down
            None,
            0.999,
            lambda twin: self.accuracy(twin.eval()),
            0.1 if small else 5,
        )
        plain = [self.accuracy(h.eval()), self.accuracy(mean.eval())]
        better = int(plain[1]["robust"] > plain[0]["robust"])
        self.report["target"] |= {"last": plain[0], "EMA 0.999": plain[1], "kept": ["last", "EMA 0.999"][better]}
        h = self.fresh_target((h, mean)[better])
        round_to_bf16(h)
        keep(h, self.out, "target", parts=2)
        say(f"target: {json.dumps(self.report['target'])}")
        h = machine.frozen_target(h, compiled)

        g = machine.denoiser(False)
        warm = lambda share: min(1.0, share / 0.06) * 0.5 * (1 + math.cos(math.pi * share))  # noqa: E731
        mean = self.fit(
            "pretrain",
            PretrainRecipe(g, h, PAPER),
            g,
            adamw(machine, g, 5e-4),
            0.3 if small else 4,
            warm,
            1.0,
            0.0,  # the weights themselves
            lambda twin: {},
            0.1 if small else 1,
        )
        round_to_bf16(g)
        keep(g, self.out, "pretrain")
        pretrained, g = g, machine.denoiser(compiled)
        g.load_state_dict(pretrained.state_dict())

        recipe = DirRecipe(g, h, IN_TWO, FAST)
        per_step = self.pace(recipe, g)
        reserve = 20 if small else 70  # judging at the end, and what is slower than the pace
        epochs = 0.3 if small else max(1.0, (self.left - reserve) / per_step / self.steps_an_epoch)
        say(f"DIR: {epochs:.1f} epochs fit at {1e3 * per_step:.1f} ms a step")
        mean = self.fit(
            "dir",
            recipe,
            g,
            adamw(machine, g, 5e-4),
            epochs,
            warm,
            1.0,
            0.998,
            lambda twin: self.accuracy(h, twin.eval()),
            0.1 if small else 3,
            lambda twin: keep(twin, self.out, "dir"),
        )
        both = [self.accuracy(h, copy.deepcopy(g).eval()), self.accuracy(h, copy.deepcopy(mean).eval())]
        better = int(both[1]["robust"] > both[0]["robust"])
        self.report["dir"] |= {"last": both[0], "EMA 0.998": both[1], "kept": ["last", "EMA 0.998"][better]}
        say(f"dir: {json.dumps(self.report['dir'])}")
        g = self.fresh_denoiser((g, mean)[better])
        round_to_bf16(g)
        keep(g, self.out, "dir")
        return self.fresh_target(h), g

    def pace(self, recipe: Any, g: nn.Module) -> float:
        """Seconds a step, measured without changing any weight."""
        kept = copy.deepcopy(g.state_dict())
        optimizer, batches = adamw(self.machine, g, 0.0), self.machine.batches(self.train, self.size)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        for _ in range(3):
            step(self.machine, recipe, next(batches), optimizer, 1.0)
        began = self.machine.wait()
        for _ in range(5):
            step(self.machine, recipe, next(batches), optimizer, 1.0)
        seconds = (self.machine.wait() - began) / 5
        g.load_state_dict(kept)
        return seconds

    def fresh_target(self, h: nn.Module) -> nn.Module:
        """An uncompiled copy in fp32."""
        made = self.machine.target(False)
        made.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in h.state_dict().items()})
        return made.eval()

    def fresh_denoiser(self, g: nn.Module) -> MaskedPurifier:
        """An uncompiled copy."""
        made = self.machine.denoiser(False)
        made.load_state_dict(g.state_dict())
        return made.eval()

    def accuracy(self, h: nn.Module, g: nn.Module | None = None) -> dict[str, float]:
        """Held-out accuracy, natural and under PGD-10 of 2/255 with masks known; crafted in bf16."""
        machine, split = self.machine, self.held_out
        generator = torch.Generator(machine.device).manual_seed(5)
        was, right = h.training, torch.zeros(2, dtype=torch.float64, device=machine.device)
        h.eval()
        for rows in torch.arange(len(split)).split(250):
            images, labels = split.pixels(rows).to(machine.device), split.labels[rows].to(machine.device)
            uniform = torch.rand(images.shape, generator=generator, device=machine.device)
            model: Callable[[Tensor], Tensor] = h
            if g is not None:
                assert isinstance(g, MaskedPurifier)
                kept = g.draw(generator, len(images))
                model = lambda x, g=g, kept=kept: h(g(x, kept))  # type: ignore[misc] # noqa: E731
            with frozen(h, *([] if g is None else [g])), machine.autocast():
                found = pgd(model, images, labels, LInf(EPSILON), 10, EPSILON / 4, uniform)
                with torch.no_grad():
                    right += torch.stack([(model(x).argmax(1) == labels).sum() for x in (images, found)])
        h.train(was)
        natural, robust = (right / len(split)).tolist()
        return {"natural": natural, "robust": robust}


def judge(machine: Machine, h: nn.Module, g: MaskedPurifier, test: Split) -> dict[str, Any]:
    """Suite quick on test images: crafted in bf16, judged in true fp32."""
    count = 32 if machine.rehearse else 1000
    defense = Defended(g, h, "dir").eval()

    tf32(False)
    if machine.gpu:
        torch.cuda.empty_cache()
    settings = EvaluationConfig(batch_size=count, rows=1000, eot=2 if machine.rehearse else 8)
    images, labels = test.pixels(slice(count)).to(machine.device), test.labels[:count].to(machine.device)
    began = machine.wait()
    report = dircluster.evaluate(
        defense,
        images,
        labels,
        "quick",
        settings=settings,
        name="dir",
        on_shard=lambda shard, done, total: say(
            f"judging {shard.spec.name}, {shard.spec.randomness}, {done} of {total}"
        ),
    )
    say(str(report))
    return {"report": report.to_plain(), "images": count, "seconds": machine.wait() - began}


def main(argv: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    machine = Machine(given.rehearse)
    data = load(replace(DATA, uri=given.data, limit=300 if given.rehearse else None), seed=0)
    name = torch.cuda.get_device_name() if machine.gpu else platform.machine()
    say(f"{name}, torch {torch.__version__}, {len(data.train)} + {len(data.held_out)} + {len(data.test)} images")
    train = data.train
    assert isinstance(train, Split)
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "images": len(train)}
    file = given.out / "train.json"
    try:
        training = Training(machine, train, data.held_out, given.out, given.seconds, given.eager)
        result["training"] = training.report
        h, g = training.run()
        file.write_text(json.dumps(result, indent=1))
        result["judged"] = judge(machine, h, g, data.test)
    except Stop as asked:
        say(f"stopped by {asked}; what was kept lies in {given.out}")
        return 1
    finally:
        result["seconds"] = time.monotonic() - BEGAN
        file.write_text(json.dumps(result, indent=1))
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
