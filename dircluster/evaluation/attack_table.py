"""Attacks by name: what runs each, what its steps count, what it needs. An entry added to ATTACKS is one more."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dircluster import rng
from dircluster.attacks.apgd import ascents, listening, malt, malt_gradients, probability_margin_loss
from dircluster.attacks.autoattack import autoattack, square
from dircluster.attacks.expectation import expected, in_parts, voting
from dircluster.attacks.gradient import (
    Loss,
    Model,
    ValueAndGrad,
    cross_entropy,
    cross_entropy_loss,
    margin_loss,
    mi_fgsm,
    projected_ascent,
    strongest,
    value_and_grad,
    vni_fgsm,
)
from dircluster.attacks.masked import masked_attack
from dircluster.attacks.restored import restored_attack
from dircluster.attacks.threat import BALLS, L2, LInf
from dircluster.config import ConfigError, require
from dircluster.evaluation.probes import PROBES
from dircluster.evaluation.victim import VictimModel

Randomness = Literal["none", "fixed", "fresh"]
Protocol = Literal["plain", "wor", "mv"]
ControlKind = Literal["natural", "noise"]
CONTROLS: tuple[ControlKind, ...] = ("natural", "noise")
LOSSES = {"ce": cross_entropy_loss, "margin": margin_loss}
ONE_OF: dict[str, tuple[str, ...]] = {
    "randomness": get_args(Randomness),
    "on": ("defense", "target"),
    "judged": ("defense", "target"),
    "norm": tuple(BALLS),
    "loss": tuple(LOSSES),
    "source": ("natural", "adversarial"),
    "protocol": get_args(Protocol),
}
"""What a spec may say, by field."""


@dataclass(frozen=True)
class AttackSpec:
    """One attack on one form of the defense, and how its images are judged.

    Radii and steps are in units of the pixel range.
    """

    attack: str
    """A name of ATTACKS."""
    randomness: Randomness = "none"
    """Random draws, known to the attacker (fixed) or new at every pass (fresh); none where nothing is random."""
    on: Literal["defense", "target"] = "defense"
    """What the attacker crafts on; what is crafted elsewhere and judged on the defense is a transfer."""
    judged: Literal["defense", "target"] = "defense"
    norm: Literal["linf", "l2"] = "linf"
    epsilon: float = 0.0
    steps: int = 0
    """Steps, or what else the attack counts."""
    step_size: float = 0.0
    restarts: int = 1
    eot: int = 1
    """Draws over which each step's gradient, or loss, is averaged."""
    loss: Literal["ce", "margin"] = "ce"
    source: Literal["natural", "adversarial"] = "natural"
    """Where the attack on the restored image starts."""
    draws: int = 1
    """Fresh draws on which every final image is judged."""
    average: int = 1
    """Draws whose logits the defense averages before it answers, or that vote on the answer; the attacker's too, but
    for bpda, which averages gradients alone (``eot``)."""
    protocol: Protocol = "plain"
    """How a defense of fresh draws answers, and when it is broken (DiffBreak, Kassis et al. 2025). wor, worst-case
    robustness: any of ``eot`` draws at any step of the attack may break an image, and any of ``draws`` at its end. mv:
    the majority of ``average`` draws answers, and the attack follows their averaged probabilities.
    """
    first: int | None = None
    """Judged on so many images alone."""
    label: str = ""
    """What the table calls it, if not its attack and steps."""

    def __post_init__(self) -> None:
        """Raises ConfigError for what no attack can have."""
        for name, words in ONE_OF.items():
            value = getattr(self, name)
            require(value in words, f"an attack's {name} must be {' or '.join(words)}, got {value!r}")
        counts = {"restarts": 1, "eot": 1, "draws": 1, "average": 1, "steps": 0, "epsilon": 0, "step_size": 0}
        for name, least in counts.items():
            value = getattr(self, name)
            require(least <= value < math.inf, f"an attack's {name} must be {least} or more, got {value}")
        require(self.first is None or self.first >= 1, f"an attack's first must be 1 or more, got {self.first}")
        several = self.average > 1 or self.protocol != "plain"
        require(
            not several or self.randomness == "fresh",
            f"an attack's average and protocol are for randomness fresh, not {self.randomness}",
        )

    @property
    def bare(self) -> bool:
        """Whether it is crafted and judged on the target alone: no defense changes what it finds."""
        return self.on == "target" and self.judged == "target"

    @property
    def name(self) -> str:
        """What the table calls it: pgd20, transfer-pgd20, autoattack-rand, ..."""
        if self.label:
            return self.label
        plain = f"{self.attack}{self.steps}" if find_attack(self.attack).labeled else self.attack
        if self.on == "target" and self.judged == "defense":
            plain = f"transfer-{plain}"
        return plain

    @property
    def protocol_name(self) -> str:
        """What the table calls the way it is judged."""
        if self.randomness == "none" or self.judged == "target":
            return "deterministic"
        if self.protocol != "plain":
            return f"Wor.Rob({self.eot})" if self.protocol == "wor" else f"MV.Rob({self.average})"
        return "deterministic white box" if self.randomness == "fixed" else "fresh draws"

    def control(self, kind: ControlKind) -> AttackSpec | None:
        """The same protocol on images that nobody attacked: natural ones, or with random noise of the same size.

        None where nothing is random, or nothing attacked. An image meets as many draws as under the attack.
        """
        past = find_attack(self.attack).past_purifier or self.judged == "target"
        if self.randomness == "none" or not self.epsilon or past:
            return None
        return self.unattacked(kind)

    def unattacked(self, kind: ControlKind) -> AttackSpec:
        """Images as they are, or with random noise of the radius, judged alike."""
        tried = self.restarts * self.steps * self.eot if self.protocol == "wor" else 0
        draws = self.draws + tried
        label = {"plain": f"mean-of-{self.average}", "wor": f"wor{self.eot}", "mv": f"mv{self.average}"}[self.protocol]
        return replace(
            self,
            attack=kind,
            on="target" if self.judged == "target" else "defense",
            epsilon=0.0 if kind == "natural" else self.epsilon,
            steps=0,
            step_size=0.0,
            restarts=1,
            eot=1,
            loss="ce",
            draws=draws,
            label="" if self.average == 1 and self.protocol == "plain" else f"{kind}-{label}",
        )


@dataclass(frozen=True)
class AttackSetting:
    """What an attack meets: a form of the victim, a ball, and draws that all follow from ``seed``.

    ``seed`` names the shard. ``defense_seed`` names the draws of the fixed form, which belong to the shard alone: every
    attack knows the same. ``most_rows`` bounds the rows, images times draws, that pass through a model at a time.
    Under protocol wor ``broken`` gets what a pass of the attack has seen break, (draws * N,) bool a pass.
    """

    victim: VictimModel
    spec: AttackSpec
    seed: int
    defense_seed: int
    most_rows: int
    broken: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def draw_rows(self) -> int:
        """As ``most_rows``, for draws: where they pass one after another an image has one row."""
        return 1 if self.victim.apart and self.spec.on == "defense" else self.most_rows

    @property
    def threat(self) -> LInf | L2:
        """The ball of the attack."""
        return BALLS[self.spec.norm](self.spec.epsilon)

    def model(self, images: int, purpose: str = "craft") -> Model:
        """What is attacked as the attacker sees it: (images, C, H, W) -> (images, classes) logits."""
        spec = self.spec
        if spec.on == "target":
            source = self.victim.target if spec.judged == "target" else self.victim.source
            assert source is not None
            return source
        if spec.protocol == "mv":
            return voting(self.victim.model(spec.randomness, self.draw_seed(purpose)), spec.average, self.victim.apart)
        return self.victim.model(
            spec.randomness, self.draw_seed(purpose), spec.average, known_images(spec, images), self.draw_rows
        )

    def value_and_grad(self, model: Model, labels: Tensor) -> ValueAndGrad:
        """Loss and gradient of the spec, averaged over its EOT draws."""
        loss, eot, votes = LOSSES[self.spec.loss], self.spec.eot, self.spec.average
        if self.spec.protocol == "mv":
            most = max(1, self.most_rows // votes)
            both = in_parts(lambda some: expected(model, some, eot, loss, 1), labels, most)
        else:
            both = expected(model, labels, eot, self._resubmitted(loss), self.draw_rows)
        return both if self.spec.randomness == "fresh" else self.victim.watch.ascent(both)  # draws would be noise

    def _resubmitted(self, loss: Loss) -> Loss:
        """The loss, which under protocol wor notes what each draw gets wrong."""

        def noting(logits: Tensor, labels: Tensor) -> Tensor:
            self.broken.append(answers(logits.detach()) != labels)
            return loss(logits, labels)

        return noting if self.spec.protocol == "wor" else loss

    def uniform(self, purpose: str, images: Tensor) -> Tensor:
        """Uniform in [0, 1), shaped as ``images``."""
        return _uniform(rng.generator(self.seed, purpose), images)

    def draw_seed(self, purpose: str) -> int:
        """Of the victim's draws while it is attacked."""
        return self.defense_seed if self.spec.randomness == "fixed" else rng.entropy(self.seed, purpose)


Runner = Callable[[AttackSetting, Tensor, Tensor], tuple[Tensor, list[str]]]
"""The setting, images (N, C, H, W), labels (N,) -> adversarial images (N, C, H, W), and what is to be warned of."""


@dataclass(frozen=True)
class Attack:
    """A row of the table. A transfer needs a surrogate besides, whatever the attack."""

    run: Runner
    counts: str = "steps"
    """What ``steps`` counts: steps, which have a size, or queries, which have none."""
    labeled: bool = False
    """Whether its name in a table carries its steps: pgd20."""
    needs: frozenset[str] = frozenset()
    """Of the victim: a ``purifier`` in front of its classifier, or ``masks`` that it sees images through."""
    code: tuple[Callable[..., Any], ...] = ()
    """What else runs it, an ``ascend`` of your own too: a stored result is void once the module of one of these, or of
    ``run``, is another.
    """
    unread: tuple[str, ...] = ()
    """Fields of a spec that it does not read: who gives one of them asks for another attack."""
    together: bool = True
    """Whether it passes all images of a shard together: a purifier's known draws are then each image's own. One that
    an image ``leaves`` does not.
    """
    past_purifier: bool = False
    """Whether its images are made for the bare classifier, and judged by it."""
    own_gradient: bool = True
    """Whether the gradient that it follows is the judged model's, as it comes back."""
    in_part: bool = False
    """Whether it passes some images of a shard alone and does not tell which, whatever draws them."""
    in_ball: bool = True
    """Whether all images that it passes lie in the ball, so that what a pass breaks counts under protocol wor."""
    starts: bool = True
    """Whether it starts at random: else its restarts differ by fresh draws alone."""
    one_step: bool = False
    """Whether it makes one step, of the radius, whatever is asked."""
    leaves: Callable[[AttackSetting], bool] = lambda setting: False
    """Whether an image that a pass gets wrong is attacked no more. Where that was bf16's rounding alone, it is attacked
    again in fp32.
    """
    gradients: Callable[[AttackSpec, int, float], float] | None = None
    """How many it takes for an image, by its spec, the number of classes, and the share of images that survive, where
    its cost depends on what it finds: so it can be foretold. None where its cost is that of its steps, or is not
    foretold.
    """


def _natural(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    return images, []


def _noise(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    return setting.threat.start(images, setting.uniform("noise", images)), []


def _autoattack(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    spec = setting.spec
    version: Literal["standard", "rand"] = "rand" if spec.randomness == "fresh" else "standard"
    model, count = setting.model(len(images)), len(images)
    return autoattack(
        model,
        images,
        labels,
        setting.threat,
        version,
        setting.seed,
        count,
        spec.eot,
        spec.steps or None,
        setting.draw_rows,
    )


def _malt(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    spec, model, warned = setting.spec, setting.model(len(images)), list[str]()
    rest: dict[str, Any] = {"draws": spec.eot, "most_rows": setting.draw_rows, "leave": _leaves(setting)}
    with listening(warned):
        return malt(model, images, labels, setting.threat, spec.steps, setting.seed, **rest), warned


def _pma(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    spec, model, warned = setting.spec, setting.model(len(images)), list[str]()
    rest: dict[str, Any] = {"draws": spec.eot, "most_rows": setting.draw_rows, "leave": _leaves(setting)}
    losses = [probability_margin_loss] * spec.restarts
    with listening(warned):
        return ascents(model, images, labels, setting.threat, losses, spec.steps, setting.seed, **rest), warned


def _leaves(setting: AttackSetting) -> bool:
    """Whether a fooled image may leave its batch: not where fresh draws decide, or those of a whole batch."""
    randomness = setting.spec.randomness
    return setting.spec.on == "target" or randomness == "none" or (randomness == "fixed" and setting.victim.drawn)


def _square(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    spec = setting.spec
    draws = spec.eot if spec.randomness == "fresh" else 1
    model = setting.model(len(images))
    return square(model, images, labels, setting.threat, spec.steps, draws, setting.seed, setting.draw_rows), []


def _masked(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    spec, victim = setting.spec, setting.victim
    masks = victim.masks(spec.randomness, setting.draw_seed("craft"), len(images))
    found = masked_attack(
        victim.logits_under,
        images,
        labels,
        setting.threat,
        spec.steps,
        spec.step_size,
        masks,
        victim.pixel_masks,
        setting.uniform("start", images),
        LOSSES[spec.loss],
    )
    return found, []


def _restored(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
    spec, threat, victim = setting.spec, setting.threat, setting.victim
    if spec.source == "adversarial":
        both = value_and_grad(cross_entropy(setting.model(len(images)), labels))
        start = threat.start(images, setting.uniform("source", images))
        images = projected_ascent(both, start, images, threat, spec.steps, spec.step_size)
    with torch.no_grad():
        known = known_images(spec, len(images))
        restored = victim.restorer(spec.randomness, setting.draw_seed("craft"), known)(images)
    assert victim.target is not None
    uniform = setting.uniform("start", images)
    return restored_attack(victim.target, restored, labels, threat, spec.steps, spec.step_size, uniform), []


def _one_step(setting: AttackSetting, both: ValueAndGrad, images: Tensor, restart: int) -> Tensor:
    threat = setting.threat
    return projected_ascent(both, images, images, threat, 1, threat.epsilon)


def _pgd(setting: AttackSetting, both: ValueAndGrad, images: Tensor, restart: int) -> Tensor:
    spec, threat = setting.spec, setting.threat
    start = threat.start(images, setting.uniform(f"start/{restart}", images))
    return projected_ascent(both, start, images, threat, spec.steps, spec.step_size)


def _momentum(setting: AttackSetting, both: ValueAndGrad, images: Tensor, restart: int) -> Tensor:
    spec = setting.spec
    return mi_fgsm(both, images, setting.threat, spec.steps, spec.step_size)


def _neighbors(setting: AttackSetting, both: ValueAndGrad, images: Tensor, restart: int) -> Tensor:
    spec, generator = setting.spec, rng.generator(setting.seed, "neighbours")
    return vni_fgsm(both, images, setting.threat, spec.steps, spec.step_size, lambda: _uniform(generator, images))


def _bypassed(setting: AttackSetting, images: int, purpose: str) -> Model:
    spec = setting.spec
    return setting.victim.bypassed(spec.randomness, setting.draw_seed(purpose), known_images(spec, images))


def first_order(
    ascend: Callable[[AttackSetting, ValueAndGrad, Tensor, int], Tensor],
    model: Callable[[AttackSetting, int, str], Model] = AttackSetting.model,
) -> Runner:
    """A runner of an attack that follows the averaged gradient: once a restart, the strongest of them counts.

    ``ascend`` takes the setting, loss and gradient, images and the restart's number; ``model`` gives what is attacked.
    """

    def run(setting: AttackSetting, images: Tensor, labels: Tensor) -> tuple[Tensor, list[str]]:
        made = []
        for restart in range(setting.spec.restarts):
            attacked = model(setting, len(images), f"craft/{restart}")
            made.append(ascend(setting, setting.value_and_grad(attacked, labels), images, restart))
        if len(made) == 1:
            return made[0], []
        judge = setting.model(len(images), "judge")
        margin = expected(judge, labels, setting.spec.eot, margin_loss, setting.draw_rows)
        return strongest(lambda found: margin(found)[0], made), []

    return run


def _uniform(generator: torch.Generator, images: Tensor) -> Tensor:
    return torch.rand(images.shape, generator=generator).to(images)


FOLLOWED = (projected_ascent, expected)
"""What runs the attacks that follow the averaged gradient."""
ATTACKS: dict[str, Attack] = {
    "natural": Attack(_natural),
    **{name: Attack(_natural, code=(probe,)) for name, probe in PROBES.items()},  # nobody is attacked
    "noise": Attack(_noise, code=(LInf,)),
    "fgsm": Attack(first_order(_one_step), code=FOLLOWED, starts=False, one_step=True),
    "pgd": Attack(first_order(_pgd), labeled=True, code=FOLLOWED),
    "mifgsm": Attack(first_order(_momentum), labeled=True, code=FOLLOWED, starts=False),
    "vnifgsm": Attack(first_order(_neighbors), labeled=True, code=FOLLOWED, starts=False, in_ball=False),
    "bpda": Attack(first_order(_pgd, _bypassed), needs=frozenset({"purifier"}), code=FOLLOWED, own_gradient=False),
    "malt": Attack(
        _malt,
        unread=("restarts", "loss"),
        counts="steps of APGD a class",
        code=(malt,),
        together=False,
        leaves=_leaves,
        gradients=lambda spec, classes, survivors: malt_gradients(spec.steps, classes, survivors),
    ),
    "pma": Attack(
        _pma,
        unread=("loss",),
        counts="steps of APGD",
        code=(ascents,),
        together=False,
        leaves=_leaves,
        gradients=lambda spec, classes, survivors: survivors * spec.restarts * (spec.steps + 1),
    ),
    "autoattack": Attack(
        _autoattack,
        unread=("restarts", "loss"),
        counts="queries of Square",
        code=(autoattack,),
        together=False,
        in_part=True,
        leaves=_leaves,
    ),
    "square": Attack(
        _square,
        unread=("restarts", "loss"),
        counts="queries of Square",
        code=(square,),
        together=False,
        in_part=True,
        leaves=_leaves,
    ),
    "masked": Attack(_masked, unread=("restarts", "eot", "average"), needs=frozenset({"masks"}), code=(masked_attack,)),
    "restored": Attack(
        _restored,
        unread=("restarts", "eot", "average", "loss"),
        needs=frozenset({"purifier"}),
        code=(restored_attack, projected_ascent),
        past_purifier=True,
        own_gradient=False,
    ),
}
"""All attacks by name. One of your own is an entry that you add, before an evaluation names it in a spec."""


def find_attack(name: str) -> Attack:
    """The row of that name. Raises ConfigError for an unknown one."""
    if name not in ATTACKS:
        raise ConfigError(f"there is no attack {name!r}; there are {', '.join(ATTACKS)}")
    return ATTACKS[name]


def attack_of(label: str) -> Attack | None:
    """The attack whose name stands at the beginning of a table's label, transfers included; None for others."""
    plain = label.removeprefix("transfer-")
    names = [name for name in ATTACKS if plain.startswith(name)]
    return ATTACKS[max(names, key=len)] if names else None


def check_fits(spec: AttackSpec, victim: VictimModel) -> None:
    """Raise ConfigError where a row would not be what it says, or would be judged under other draws than it met."""
    found, known = find_attack(spec.attack), spec.randomness == "fixed" and spec.on == "defense"
    require(not known or spec.eot == 1, f"attack {spec.name} knows the draw: eot must be 1, got {spec.eot}")
    require(
        not (known and found.in_part and victim.apart),
        f"attack {spec.name} passes some images alone, which then meet other draws of {victim.name} than they are"
        " judged under: take randomness fresh, or malt",
    )
    require(
        found.in_ball or spec.protocol != "wor",
        f"attack {spec.name} looks outside the ball, and protocol wor counts every pass: take pgd",
    )
    again = spec.restarts == 1 or spec.randomness == "fresh" or found.starts
    require(again, f"attack {spec.name} starts at the image: leave restarts 1, got {spec.restarts}")
    one = spec.steps <= 1 and spec.step_size in (0, spec.epsilon)
    require(one or not found.one_step, f"attack {spec.name} makes one step, of epsilon: leave steps and step_size")


def modules_of_attack(name: str) -> frozenset[str]:
    """The modules whose code runs an attack, without what they import in turn, and without this one."""
    found = find_attack(name)
    return frozenset(part.__module__ for part in (found.run, *found.code)) - {__name__}


def answers(logits: Tensor) -> Tensor:
    """The classes of logits (..., N, classes), (..., N) int64; -1, which no label is, where they are not finite."""
    return torch.where(logits.isfinite().all(dim=-1), logits.argmax(dim=-1), -1)


def known_images(spec: AttackSpec, images: int) -> int:
    """How many images' fixed masks there are: one for each, or one for all where an attack passes some alone."""
    return images if find_attack(spec.attack).together else 1
