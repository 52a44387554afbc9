"""What differs between defenses, as values: the networks, the stages that train them, what is deployed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dircluster import rng
from dircluster.config import DataConfig, OptimizerConfig, RunConfig, TargetConfig, from_dict, to_dict
from dircluster.defenses.base import Defended, Purifier
from dircluster.defenses.recipe import Recipe
from dircluster.models import classifiers

Modules = Mapping[str, nn.Module]
"""A run's networks by name; the target is the one called ``classifier``."""


@dataclass(frozen=True)
class Stage:
    """What is trained, for how long, how, and what its weights depend on."""

    name: str
    recipe: Callable[[Modules], Recipe]
    epochs: int
    optimizers: dict[str, OptimizerConfig]
    """By the name of the module that each trains."""
    sections: tuple[str, ...] = ()
    """Sections of the run that decide its weights, beside ``attack``, ``training`` and those of the data."""
    stored: tuple[str, ...] = ()
    """Modules that its finished folder holds; those it trains where none are named."""
    keep: Literal["best", "last"] = "best"
    """Whether it ends on its best held-out weights (robust accuracy) or on its last."""
    ema: float | None = None
    """Decay of the running mean of weights and statistics that is validated and kept; none where not given."""
    on_pipeline: bool = True
    """Whether its samples are crafted on the whole pipeline: else ``attack.crafting`` decides nothing of it."""
    augments: bool = True
    """Whether its training images are cropped and flipped as the data section says."""
    passes: int = 1
    """Forward passes of what it trains in an update: each gathers sharded weights."""
    revision: int = 1
    """Raised where the same settings give other weights than before: older results are then not reused."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that hold the stage's result."""
        return self.stored or tuple(self.optimizers)

    @property
    def notes(self) -> tuple[str, ...]:
        """A line where a rate that is to fall at milestones never does; one for optimizers with the same ones."""
        stepped = [each.milestones for each in self.optimizers.values() if each.canonical.schedule == "step"]
        return tuple(
            f"the learning rate never falls: milestones {', '.join(map(str, epochs))} of {self.epochs} epochs"
            for epochs in dict.fromkeys(stepped)
            if min(epochs) >= self.epochs > 0
        )


@dataclass(frozen=True)
class Defense:
    """A purification defense: everything else asks it, and knows none by name."""

    name: str
    run: type[RunConfig]
    modules: Callable[[Any], dict[str, Callable[[], nn.Module]]]
    """Of a run: what makes each network beside the target; ``purifier`` is the one that is deployed."""
    stages: Callable[[Any], tuple[Stage, ...]]
    """Of a run: its stages in order, the target's among them where the target is not learned together."""
    describe: Callable[[Any], str]
    """Of a run: two or three sentences for the model card, with the source."""
    facts: Callable[[Any], list[tuple[str, str]]] = lambda run: []
    """Of a run: more lines for --dry-run, a word and a text."""
    purifier: str = "purifier"
    """Name of the network that is deployed."""
    sections: tuple[str, ...] = ()
    """Sections of the run that decide the networks' shapes."""
    repeats: str = ""
    """The setting, by its dotted name, that says how often a pass through the purifier repeats the same work, where it
    may be so often that what a pass costs is better counted on a few times."""

    def build(self, run: RunConfig, name: str) -> nn.Module:
        """A network of the run with its initial weights, a function of the seed."""
        if name == "classifier":
            with rng.seeded_torch_rng(run.seed, "target/weights"):
                return classifiers.build(architecture(run), run.data, normalization=run.target.normalization)
        with rng.seeded_torch_rng(run.seed, f"{name}/weights"):
            return self.modules(run)[name]()

    def defended(self, run: RunConfig, modules: Modules) -> Defended:
        """h(g(x)) over networks of the run."""
        purifier = modules[self.purifier]
        assert isinstance(purifier, Purifier)
        made = Defended(purifier, modules["classifier"], self.name)
        made.image_shape = (run.data.channels, run.data.height, run.data.width)
        made.settings = {name: section for name, section in to_dict(run).items() if name in self.sections}
        return made

    def to_plain(self, run: RunConfig) -> dict[str, Any]:
        """What is needed to build the finished defense again, as plain data."""
        plain = to_dict(run)
        shape = {k: plain["data"][k] for k in ("channels", "height", "width", "classes")}
        return {
            "name": self.name,
            **{name: plain[name] for name in self.sections},
            "data": shape,
            "architecture": architecture(run),
            **({} if run.target.normalization is None else {name: plain["target"][name] for name in ("mean", "std")}),
        }

    def from_plain(self, plain: Mapping[str, Any]) -> RunConfig:
        """A run with the networks that :meth:`to_plain` wrote down. Raises ConfigError, KeyError or TypeError."""
        kind = self.run()
        sections = {name: from_dict(type(getattr(kind, name)), plain[name]) for name in self.sections}
        data = from_dict(DataConfig, plain["data"])
        target = {name: plain[name] for name in ("architecture", "mean", "std") if name in plain}
        return self.run(data=data, target=from_dict(TargetConfig, target), **sections)


def architecture(run: RunConfig) -> str:
    """The target's architecture: that of ``target.uri`` where it names a timm model."""
    uri = run.target.uri or ""
    return uri if uri.startswith("timm:") else run.target.architecture
