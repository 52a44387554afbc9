"""Which version of a registered defense is its champion: alias ``candidate`` is the newest, ``champion`` is earned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from dircluster.config import digest
from dircluster.evaluation.results import worst_attacked

CHAMPION, CANDIDATE = "champion", "candidate"
EVIDENCE_TAG = "dircluster.evaluation."
"""Begins the tags that hold what evaluations found of a version; the rest says on which images, by which attacks."""
NO_SUCH = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
"""What MLflow answers where no version has an alias."""
ATTACK = (
    "attack",
    "randomness",
    "norm",
    "epsilon",
    "steps",
    "step_size",
    "restarts",
    "eot",
    "loss",
    "draws",
    "average",
)


@dataclass(frozen=True)
class Evidence:
    """What one evaluation found of a version. Shares lie in [0, 1]."""

    attack: str
    """The attack that left least."""
    robust: float
    """Accuracy under it."""
    low: float
    """Lower end of its 95 % interval."""
    images: int
    flags: int | None = None
    """Questions of the verdict that are flagged; None where it was not asked."""
    marked: bool = False
    """Whether the row of that attack is marked: it may flatter."""


def evidence_of(
    rows: Sequence[Mapping[str, Any]], norm: str, data: str, flags: int | None = None
) -> tuple[str, Evidence] | None:
    """What rows of results say of a defense, and the key of images and attacks; None where no attack ran.

    ``data`` is the digest of the data set that the images are from.
    """
    worst = worst_attacked(rows, norm)
    if worst is None:
        return None
    met = [[row.get(name) for name in (*ATTACK, "total", "sample")] for row in rows if row["defense"] != "none"]
    marked = bool(worst.get("marks"))
    evidence = Evidence(worst["attack"], worst["accuracy"], worst["interval"][0], worst["total"], flags, marked)
    return digest([data, met])[:12], evidence


def note(client: MlflowClient, version: ModelVersion, found: tuple[str, Evidence]) -> ModelVersion:
    """Keep ``found`` with the version: -> the version as it is then. A verdict that was asked before stays."""
    key, evidence = found
    known = evidence_by_key(version).get(key)
    if evidence.flags is None and known is not None:
        evidence = dataclasses.replace(evidence, flags=known.flags)
    text = json.dumps(dataclasses.asdict(evidence))
    client.set_model_version_tag(version.name, version.version, EVIDENCE_TAG + key, text)
    return client.get_model_version(version.name, version.version)


def evidence_by_key(version: ModelVersion) -> dict[str, Evidence]:
    """What evaluations found of a version, by images and attacks; what a later release notes besides is not read."""
    known, found = {field.name for field in dataclasses.fields(Evidence)}, dict[str, Evidence]()
    for name, text in version.tags.items():
        if name.startswith(EVIDENCE_TAG):
            noted = {key: value for key, value in json.loads(text).items() if key in known}
            found[name.removeprefix(EVIDENCE_TAG)] = Evidence(**noted)
    return found


def crown(client: MlflowClient, version: ModelVersion) -> str:
    """Make the version champion where it has earned it: -> a line that says so, or why not."""
    name, number, own = version.name, version.version, evidence_by_key(version)
    flags = sum(evidence.flags or 0 for evidence in own.values())
    marked = next((each.attack for each in own.values() if each.marked), "")
    flagged = f"the verdict flags {flags} question{'s' if flags > 1 else ''} of it"
    if not flags and marked:
        flagged = f"its strongest row, {marked}, is marked: it may flatter"
    asked = "" if any(each.flags is not None for each in own.values()) else "; no verdict was asked"
    holder = champion_of(client, name)
    if holder is not None and holder.version == number:
        return f"version {number} is champion already" + (f", although {flagged}" if flags or marked else asked)
    if flags or marked:
        return f"version {number} stays candidate: {flagged}"
    if holder is not None:
        other = evidence_by_key(holder)
        shared = sorted(own.keys() & other.keys())
        if not shared:
            return (
                f"version {number} stays candidate: no evaluation has judged it and version {holder.version}, the"
                " champion, on the same images by the same attacks; judge"
                f" models:/{name}@{CHAMPION} and models:/{name}@{CANDIDATE} alike"
            )
        for key in shared:
            if own[key].low <= other[key].robust and not other[key].marked:
                return f"version {number} stays candidate: {_beside(own[key], other[key], holder)}"
    client.set_registered_model_alias(name, CHAMPION, number)
    why = "there was none" if holder is None else _beside(own[shared[0]], other[shared[0]], holder)
    return f"version {number} is champion: {why}{asked}"


def champion_of(client: MlflowClient, name: str) -> ModelVersion | None:
    """The champion among the versions of ``name``; None where there is none yet.

    Raises what MLflow does where it does not say so: a registry that is away for a moment is not one without champion.
    """
    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in NO_SUCH:
            raise
        return None


def _beside(own: Evidence, other: Evidence, holder: ModelVersion) -> str:
    if other.marked:
        return f"the strongest row of version {holder.version}, {other.attack}, is marked: it may flatter"
    beats = "is above" if own.low > other.robust else "is not above"
    return (
        f"its lower bound {100 * own.low:.1f} % ({own.attack}) {beats} the {100 * other.robust:.1f} %"
        f" ({other.attack}) of version {holder.version}, on the same {own.images} images"
    )
