"""What a defense must face, and on how many images: the settings of an evaluation, as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from dircluster.config.errors import require, require_positive

SuiteName = Literal["quick", "autoattack", "paper", "rigorous"]
USUAL_ROWS = 256
"""Rows that pass through a model at a time where none are given: on a CPU, and on a GPU at least."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation on the test split: what a defense must face, and on how many images."""

    suite: SuiteName = "quick"
    """quick: PGD and MALT; autoattack: what RobustBench asks; paper: Tables 1 and 3, Eq. 8 and 9; rigorous: what a
    strong reviewer adds."""
    verdict: bool = False
    """Ask too whether the defense only hides gradients: 16 to 18 questions, with attacks of their own."""
    images: int | None = None
    """Test images judged, the first ones; all when not given."""
    sample: int | None = None
    """Seed by which evaluation.images are drawn at random from the test split, instead of the first ones."""
    verdict_images: int = 128
    """Of these, as many answer for the verdict."""
    batch_size: int = 128
    """Images attacked together: a shard, the unit of work, of resumption and of the random draws."""
    rows: int | None = None
    """Most rows, images times mask draws, that pass through a model at a time: memory against speed. When not given:
    256 on a CPU; on a GPU as many as half of its free memory holds, from 256 to 2,048."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What attacks are crafted in; auto: bf16 on a GPU, fp32 on a CPU and for networks whose first layers bf16 would
    round. Final predictions, and what is crafted in fp32, are always made without TF32."""
    steps: int | None = None
    """Steps of every iterative attack; each suite's own when not given: 20, or 200 in rigorous; MALT 30, in quick 20;
    PMA 100."""
    restarts: int | None = None
    """Random starts of PGD, of which the strongest counts; 1, or 2 against fixed masks in rigorous, when not given."""
    eot: int | None = None
    """Mask draws whose gradients are averaged at each step against fresh masks; 4 in quick, else 20, when not given."""
    draws: int | None = None
    """Fresh mask draws on which every final image is judged again; 10 in quick, else 20, when not given."""
    resubmissions: int | None = None
    """N of Wor.Rob(N), the draws of which any may break an image after each step, in paper and rigorous; 10 when not
    given."""
    votes: int | None = None
    """K of MV.Rob(K), the draws whose majority answers, in paper and rigorous; 11 when not given."""
    queries: int = 5000
    """Queries of Square, alone and in AutoAttack."""
    l2_epsilon: float = 0.5
    """Radius of the L2 ball in rigorous."""

    def __post_init__(self) -> None:
        require_positive("evaluation", self, "batch_size", "queries", "l2_epsilon", "verdict_images")
        for name in ("images", "rows", "steps", "restarts", "eot", "draws", "resubmissions", "votes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"evaluation.{name} must be positive, got {value}")
        require(self.sample is None or self.sample >= 0, f"evaluation.sample must be 0 or more, got {self.sample}")
        require(
            self.sample is None or self.images is not None,
            "evaluation.images is missing: evaluation.sample draws so many from the test split",
        )

    @property
    def usual_rows(self) -> int:
        """``rows``, or what they are on a CPU: what is counted and what keys hold, on whatever device."""
        return USUAL_ROWS if self.rows is None else self.rows

    @property
    def thorough(self) -> bool:
        """Whether the suite asks for further protocols, attacks that a purifier names, and the verdict."""
        return self.suite in ("paper", "rigorous")

    @property
    def canonical(self) -> EvaluationConfig:
        """The same evaluation in one form: what all of its attacks would derive is not given, nor what none reads."""
        same: dict[str, Any] = {name: None for name, value in self.derived.items() if getattr(self, name) == value}
        if not self.verdict:
            same["verdict_images"] = EvaluationConfig.verdict_images
        if self.suite != "rigorous":
            same["l2_epsilon"] = EvaluationConfig.l2_epsilon
        if not self.thorough:
            same |= {"resubmissions": None, "votes": None}
        if self.suite == "quick" and not self.verdict:
            same["queries"] = EvaluationConfig.queries
        return replace(self, **same)

    @property
    def derived(self) -> dict[str, int]:
        """What settings that are not given are, where that is one number in both the suite and the verdict."""
        quick, found = self.suite == "quick", {"resubmissions": 10, "votes": 11}
        if quick:
            found["steps"] = 20
        if self.suite != "rigorous":
            found["restarts"] = 1
        if quick or not self.verdict:
            found["draws"] = 10 if quick else 20
        if not self.thorough and not self.verdict:
            found["eot"] = 4 if quick else 20
        return found
