"""Rows of a table of results: an accuracy and the evidence for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dircluster.evaluation.marks import Mark


@dataclass(frozen=True)
class Control:
    """What the protocol of a row leaves of images that nobody attacked. Shares lie in [0, 1]."""

    accuracy: float
    worst: float
    """In the worst draw."""
    always: float
    """Share of images that are right in every draw."""


@dataclass(frozen=True)
class Result:
    """One accuracy and the evidence for it. Shares lie in [0, 1]."""

    defense: str
    """none (the bare target), dir, or the name of somebody's module."""
    attack: str
    randomness: str
    """none (nothing is random), fixed (the attacker knows the draws), or fresh (new at every pass)."""
    accuracy: float
    """correct / judged: under fresh draws the mean over all of them."""
    correct: int
    judged: int
    """Images times draws."""
    total: int
    """Images."""
    interval: tuple[float, float]
    """95 % Wilson interval of the accuracy over ``total`` images; with draws averaged it is on the wide side."""
    draws: int
    """Fresh draws on which every final image was judged again; 1 where nothing is random."""
    mean: float
    """Accuracy over those draws."""
    worst: float
    """Accuracy in the worst of them."""
    always: float
    """Share of images that are right in every one: what an attacker with any draw leaves."""
    norm: str
    epsilon: float
    steps: int
    step_size: float
    restarts: int
    eot: int
    loss: str
    average: int
    sha256: str
    """Of the shards' digests, in order, each of its adversarial images (float32)."""
    warnings: tuple[str, ...] = ()
    crafting: str = "fp32"
    """fp32 or bf16: what the attack was computed in, but for images that bf16 alone got wrong (fp32); both where shards
    differ.
    """
    predictions: str = "fp32"
    """What the accuracy was computed in: fp32, without TF32."""
    protocol: str = "deterministic"
    """deterministic, deterministic white box, fresh draws, Wor.Rob(N), or MV.Rob(K)."""
    natural: Control | None = None
    """The control of a row of a randomized defense: the same protocol on natural images."""
    noise: Control | None = None
    """The same, on images with random noise of the same size."""
    marks: tuple[Mark, ...] = ()
    """What tells that the attack may have been weak, or the defense has collapsed: the accuracy is no evidence."""
    sample: int | None = None
    """Seed that drew the images from the test split; None where they are its first ones."""

    @property
    def luck(self) -> float | None:
        """Of what the row has lost, the share in [0, 1] that natural images lose too; None without a control."""
        if self.natural is None or self.accuracy >= 1:
            return None
        return min(1.0, (1 - self.natural.accuracy) / (1 - self.accuracy))


def to_plain(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows for JSON, each with its ``luck``."""
    lists = ("interval", "warnings", "marks")
    return [
        {**(plain := asdict(row)), **{name: list(plain[name]) for name in lists}, "luck": row.luck} for row in results
    ]


def own_rows(rows: Iterable[Mapping[str, Any]], defense: str) -> list[Mapping[str, Any]]:
    """The rows of a defense among those of its report, which has its bare target's too, as none."""
    return [row for row in rows if row["defense"] == defense]


def worst_attacked(rows: Iterable[Mapping[str, Any]], norm: str) -> Mapping[str, Any] | None:
    """The row that leaves the defense least in the ball of ``norm``: its robust accuracy; None where no attack ran."""
    return strongest((row for row in rows if row["defense"] != "none"), norm)


def strongest(rows: Iterable[Mapping[str, Any]], norm: str) -> Mapping[str, Any] | None:
    """The same among the rows of one defense, or of a bare target.

    Rows with averaged logits or votes are of another defense, attacks on the restored image of another threat, and
    Wor.Rob counts more than one draw.
    """
    attacked = [row for row in rows if row["epsilon"] and row["norm"] == norm]
    own = [row for row in attacked if row["average"] == 1 and not row["attack"].startswith("restored")]
    own = [row for row in own if not row.get("protocol", "").startswith("Wor.Rob")]
    return min(own, key=lambda row: row["accuracy"], default=None)


def headline(rows: Sequence[Mapping[str, Any]], norm: str) -> dict[str, float]:
    """What defenses are ranked by: accuracy on natural images, under the strongest attack, and that one's lower end.

    ``marked_rows``, of the defense, counts those whose accuracy may flatter.
    """
    natural = next((row for row in rows if row["defense"] != "none" and row["attack"] == "natural"), None)
    found = {} if natural is None else {"natural_accuracy": natural["accuracy"]}
    if (worst := worst_attacked(rows, norm)) is not None:
        found |= {"robust_accuracy": worst["accuracy"], "robust_accuracy_low": worst["interval"][0]}
        found["marked_rows"] = float(sum(bool(row.get("marks")) for row in rows if row["defense"] != "none"))
    return found


def name_of(row: Mapping[str, Any]) -> str:
    """What a row is called: DEFENSE/ATTACK/RANDOMNESS, as in an export."""
    return f"{row['defense']}/{row['attack']}/{row['randomness']}"


def n_of(row: Mapping[str, Any]) -> str:
    """How many images a row of results is of, with the sample where they are not the first ones."""
    return str(row["total"]) if row.get("sample") is None else f"{row['total']} (sample {row['sample']})"


def images_of(row: Mapping[str, Any]) -> str:
    """The same as words for the title of a table."""
    chosen = "first" if row.get("sample") is None else f"sample {row['sample']} of"
    return f"{chosen} {row['total']} images"
