"""Figures of a report: what they show, measured as arrays, and drawn as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dircluster import rng
from dircluster.attacks.gradient import cross_entropy, mi_fgsm, pgd, value_and_grad
from dircluster.attacks.threat import threat_of
from dircluster.config import AttackConfig
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import under_attack

SHARES = tuple(i / 10 for i in range(11))
"""Shares of the noise that Figure 2 discards."""


def discarded_noise(
    targets: Mapping[str, nn.Module], images: Tensor, labels: Tensor, attack: AttackConfig, steps: int, seed: int
) -> dict[str, list[float]]:
    """Accuracy of each target while a random share of the pixels' adversarial noise is discarded (Figure 2).

    (N, C, H, W), (N,) -> by "target, attack", a value for each of SHARES. The noise is PGD's and MI-FGSM's on that
    target alone; a pixel's channels go together.
    """
    threat, step_size, found = threat_of(attack), attack.step_for(steps), {}
    order = torch.rand(len(images), 1, *images.shape[2:], generator=rng.generator(seed, "figure2")).to(images)
    start = torch.rand(images.shape, generator=rng.generator(seed, "figure2/start")).to(images)
    for name, target in targets.items():
        with under_attack(target):
            made = {
                "PGD": pgd(target, images, labels, threat, steps, step_size, start),
                "MI-FGSM": mi_fgsm(value_and_grad(cross_entropy(target, labels)), images, threat, steps, step_size),
            }
            for kind, adversarial in made.items():
                noise = adversarial - images
                with torch.no_grad():
                    found[f"{name}, {kind}"] = [
                        (target(images + noise * (order >= share)).argmax(1) == labels).double().mean().item()
                        for share in SHARES
                    ]
    return found


def restoration(
    victim: VictimModel, images: Tensor, labels: Tensor, attack: AttackConfig, steps: int, seed: int
) -> tuple[dict[str, Tensor], float]:
    """Images on their way through a purifier (Figures 4 and 7): by row, (n, C, H, W); and a share.

    The share is that of restored pixels outside [0, 1]: what a purifier does beyond cleaning.
    """
    model, restore = victim.model("fixed", seed), victim.restorer("fixed", seed)
    start = torch.rand(images.shape, generator=rng.generator(seed, "figures/start")).to(images)
    with under_attack(*victim.modules):
        adversarial = pgd(model, images, labels, threat_of(attack), steps, attack.step_for(steps), start)
        with torch.no_grad():
            natural, cleaned = restore(images), restore(adversarial)
    rows = {"natural": images, "adversarial": adversarial}
    rows |= {f"view {number}": view for number, view in enumerate(victim.views(adversarial, seed), 1)}
    rows |= {"restored": cleaned, "restored natural": natural}
    outside = ((cleaned < 0) | (cleaned > 1)).double().mean().item()
    return rows, outside


def embedding(restored: Tensor, seed: int) -> Tensor | None:
    """UMAP of restored images (Figure 5): (N, C, H, W) -> (N, 2); None where umap-learn is not installed.

    PyTorch has as many threads afterwards as before: numba, which UMAP is written in, takes all cores for both.
    """
    threads = torch.get_num_threads()
    try:
        from umap import UMAP
    except ImportError:
        return None
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flat = restored.flatten(1).cpu().numpy()
            return torch.as_tensor(UMAP(random_state=seed, n_neighbors=min(15, len(flat) - 1)).fit_transform(flat))
    finally:
        torch.set_num_threads(threads)


def drawing(draw: Callable[[Any], None], width: float, height: float, columns: int = 1) -> bytes:
    """PNG of a figure with ``columns`` axes side by side, which ``draw`` is given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots(1, columns, squeeze=False)[0])
    held = io.BytesIO()
    figure.savefig(held, format="png")
    return held.getvalue()


def draw_shares(found: Mapping[str, Sequence[float]]) -> bytes:
    """Figure 2: accuracy against the share of the noise that is discarded."""

    def draw(axes: Any) -> None:
        for name, values in found.items():
            style = {"linestyle": "-" if "natural" in name else ":", "marker": "s" if "MI" in name else "o"}
            axes[0].plot([100 * s for s in SHARES], [100 * v for v in values], markersize=4, label=name, **style)
        axes[0].set(xlabel="noise discarded, % of pixels", ylabel="accuracy, %", ylim=(-2, 102))
        axes[0].grid(alpha=0.3)
        axes[0].legend()

    return drawing(draw, 6, 4)


def draw_images(rows: Mapping[str, Tensor]) -> bytes:
    """Rows of images, each named."""

    def draw(axes: Any) -> None:
        framed = [torch.nn.functional.pad(image.clamp(0, 1).cpu(), (1, 1, 1, 1), value=1.0) for image in rows.values()]
        sheet = [torch.cat([*image], dim=2) for image in framed]
        height = sheet[0].shape[1]
        picture = torch.cat(sheet, dim=1).permute(1, 2, 0)
        axes[0].imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes[0].set_yticks([(i + 0.5) * height - 0.5 for i in range(len(rows))], list(rows))
        axes[0].set_xticks([])
        axes[0].tick_params(length=0)
        for spine in axes[0].spines.values():
            spine.set_visible(False)

    count = len(next(iter(rows.values())))
    return drawing(draw, 2.2 + 0.95 * count, 0.95 * len(rows) + 0.2)


def draw_embedding(points: Tensor, labels: Tensor, adversarial: Tensor) -> bytes:
    """Figure 5: one color a class, natural images as dots and adversarial ones as crosses."""

    def draw(axes: Any) -> None:
        for mask, marker, name in ((~adversarial, "o", "natural"), (adversarial, "x", "adversarial")):
            x, y = points[mask].T.numpy()
            axes[0].scatter(x, y, c=labels[mask].numpy(), cmap="tab10", marker=marker, s=12, linewidths=0.8, label=name)
        axes[0].set(xticks=[], yticks=[])
        axes[0].legend()

    return drawing(draw, 6, 5)
