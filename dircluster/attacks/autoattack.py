"""AutoAttack (Croce and Hein 2020) and Square (Andriushchenko et al. 2020), as pyautoattack has them.

Both draw from PyTorch's own stream, which is seeded here and put back. The model must draw from another one.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dircluster import rng
from dircluster.attacks.apgd import ascents, listening
from dircluster.attacks.expectation import expected_values
from dircluster.attacks.gradient import (
    Loss,
    Model,
    Objective,
    cross_entropy_loss,
    margin_loss,
    refuse_inference,
    surely,
)
from dircluster.attacks.threat import L2, LInf


def _steep_dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """DLR: (N, classes), (N,) -> (N,). Past the boundary no gradient passes its scale.

    Its own gradient there is exactly zero where the true class ranks third: both differences are one then.
    """
    ordered, margin = logits.float().sort(dim=1).values, margin_loss(logits.float(), labels)
    scale = ordered[:, -1] - ordered[:, -3] + 1e-12
    return margin / torch.where(margin < 0, scale, scale.detach())


RAND: dict[str, Loss] = {"apgd-ce": cross_entropy_loss, "apgd-dlr": _steep_dlr}
"""The attacks of `rand`, and their losses."""


def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: LInf | L2,
    version: Literal["standard", "rand"],
    seed: int,
    batch_size: int = 250,
    eot: int = 20,
    queries: int | None = None,
    most_rows: int | None = None,
) -> tuple[Tensor, list[str]]:
    """APGD-CE, targeted APGD, FAB and Square (standard), or APGD-CE and -DLR with EOT (rand).

    (N, C, H, W), (N,) -> adversarial images (N, C, H, W), and what the library warned of. With fewer than four
    classes the attacks that need more are left out, and a warning says so. Standard is the library's own, to the
    image: what one of its attacks fools faces no later one. In rand the ``eot`` draws of a step pass side by side.
    Raises ConfigError inside ``torch.inference_mode()``.
    """
    refuse_inference()
    if version == "rand":
        return _rand(model, images, labels, threat, seed, eot, most_rows)
    from pyautoattack import AutoAttack

    def attacked(candidates: Tensor) -> Tensor:
        logits = model(candidates).float()  # the library's projections take float32 alone
        return logits + 0 * candidates.flatten(1).sum(dim=1, keepdim=True)  # an absent gradient is zero, not an error

    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    warned: list[str] = []
    with rng.seeded_torch_rng(seed, "autoattack"), listening(warned):
        attack = AutoAttack(
            attacked, eps=threat.epsilon, norm=_norm(threat), seed=seed % 2**31, version=version, device=images.device
        )
        if queries is not None:
            attack.square.n_queries = queries
        targets = min(9, classes - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        attack.attacks_to_run = _possible(attack.attacks_to_run, classes, warned)
        height, width = images.shape[2:]
        if _room(height, width, threat) != (height, width):
            attack.attacks_to_run.remove("square")
            warned.append(f"left out in L2 on images of {width} x {height}, where its tiles do not fit: square")
        found, _ = attack.run_standard_evaluation(images, labels, batch_size=batch_size)
    if len(images) < ENOUGH:
        warned = [line for line in warned if not line.startswith("Square Attack has decreased")]
    return found.detach(), warned


def _rand(
    model: Model, images: Tensor, labels: Tensor, threat: LInf | L2, seed: int, eot: int, most_rows: int | None
) -> tuple[Tensor, list[str]]:
    """Every image meets both losses: one that a single evaluation of a randomized model calls broken may be luck."""
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    warned: list[str] = []
    losses = [RAND[name] for name in _possible(list(RAND), classes, warned)]
    with listening(warned):
        found = ascents(model, images, labels, threat, losses, 100, seed, eot, most_rows, leave=False)
    return found, warned


def _possible(attacks: list[str], classes: int, warned: list[str]) -> list[str]:
    """Those that so many classes are enough for; ``warned`` gets a line on the others."""
    possible = [name for name in attacks if classes >= {"apgd-t": 4, "apgd-dlr": 3}.get(name, 2)]
    if left_out := [name for name in attacks if name not in possible]:
        warned.append(f"left out with {classes} classes: {', '.join(left_out)}")
    return possible


def square(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: LInf | L2,
    queries: int,
    draws: int,
    seed: int,
    most_rows: int | None = None,
) -> Tensor:
    """Random search without gradients, its margin averaged over ``draws`` passes.

    (N, C, H, W), (N,) -> (N, C, H, W), each image's of the lowest margin that was found. An image on which the
    library's tiles do not fit is given an edge that the model never sees.
    """
    from pyautoattack.square import SquareAttack

    height, width = images.shape[2:]
    high, wide = _room(height, width, threat)

    def seen(padded: Tensor) -> Tensor:
        return padded[..., :height, :width]

    def margin(logits: Tensor, some: Tensor) -> Tensor:
        found = surely(margin_loss(logits.float(), some), logits, some)
        return found.nan_to_num(posinf=1.0)  # the library computes with it

    def averaged(some: Tensor) -> Objective:
        return expected_values(lambda padded: model(seen(padded)), some, draws, margin, most_rows)

    class Averaged(SquareAttack):  # type: ignore[misc,no-any-unimported]
        def margin_and_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            mean = -averaged(y)(x)
            return mean, mean.clone()

    with rng.seeded_torch_rng(seed, "square"), torch.no_grad():
        attack: Any = Averaged(
            model, norm=_norm(threat), n_queries=queries, eps=threat.epsilon, seed=seed, device=images.device
        )
        padded = F.pad(images, (0, wide - width, 0, high - height))
        attack.init_hyperparam(padded)
        found: Tensor = attack.attack_single_run(padded, labels)[1]
    return seen(found).detach()


def _room(height: int, width: int, threat: LInf | L2) -> tuple[int, int]:
    """The size from (height, width) up on which Square starts: in L2 on a square, from tiles of a fifth of its side, of
    which none may end beyond the edge.
    """
    if isinstance(threat, LInf):
        return height, width

    def fits(side: int) -> bool:
        tile = side // 5
        return tile == 1 or (tile > 1 and (side - 5 * tile) // 2 + side // tile * tile <= side)

    if height == width and fits(height):
        return height, width
    side = next(side for side in itertools.count(max(height, width)) if fits(side))
    return side, side


def _norm(threat: LInf | L2) -> str:
    return "Linf" if isinstance(threat, LInf) else "L2"


ENOUGH = 500
"""Images below which one that Square alone breaks is more than the share (0.2 %) that the library warns of."""
