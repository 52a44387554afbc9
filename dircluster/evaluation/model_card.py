"""A finished run in words: the model card that travels with the defense."""

from __future__ import annotations

from typing import Any

from dircluster.config import RunConfig, is_own_code
from dircluster.defenses.table import DEFENSES, find_defense
from dircluster.evaluation.results import images_of, n_of
from dircluster.evaluation.suites import how
from dircluster.evaluation.versions import each_once

CARD = """# {name}: a {defense} defense

{description}

- images: {channels} x {height} x {width} in [0, 1], {classes} classes; data `{data}` (SHA-256 {fingerprint})
- target: {target}
- threat: {norm}, epsilon {epsilon:.4g}; seed {seed}; code {code}

## Accuracy on the test split

{table}

Deterministic white box: the attacker knows what the defense draws. Fresh draws: it draws again at every pass, the
attack averages its gradient over so many draws (EOT) as the table says, and the accuracy is the mean over further ones,
up to {draws}. Wor.Rob(N): any of N draws at any iterate may break an image. MV.Rob(K): the majority of K draws answers.
The control of a row is the same protocol on images that nobody attacked: what it loses there is luck. This is suite
`{suite}`: a stronger attack may bring the accuracy further down, none can bring it up.

## Use

```python
import dircluster
defense = dircluster.load_defense("{uri}"{trust}){which}
logits = defense(images)
```

The defense protects against small {norm} noise on images like those it was trained on, and against nothing else.
"""


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Results as a Markdown table, and above it which images they are of."""
    lines = [f"Accuracy, {images_of(rows[0])}:", ""] if rows else []
    lines += ["| defense | attack | protocol | accuracy | 95 % interval | n | how |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["interval"]
        protocol, marked = row.get("protocol", row["randomness"]), " !" if row.get("marks") else ""
        lines.append(
            f"| {row['defense']} | {row['attack']} | {protocol} | {100 * row['accuracy']:.1f} %{marked}"
            f" | {100 * low:.1f} to {100 * high:.1f} | {n_of(row)} | {how(row)} |"
        )
    return "\n".join(lines)


def _target(config: RunConfig, given: dict[str, Any] | None) -> str:
    """What the target is: trained here by an objective, or given, of which only its file is known."""
    target = config.target
    if given is None:
        return f"{target.architecture}, objective {target.objective}"
    made = "" if given["uri"].startswith("timm:") else f", {target.architecture}"
    return f"given, `{given['uri']}` (SHA-256 {given['sha256']}){made}"


def _code(outcome: dict[str, Any], commit: str) -> str:
    """The versions of the code that trained the stages, and where they are not ``commit`` alone, that it judged."""
    found = each_once(outcome.get("trained_by", {}))
    return commit if found in ([], [commit]) else f"{', '.join(found)}; judged by {commit}"


def model_card(config: RunConfig, outcome: dict[str, Any], commit: str, folder: str = "") -> str:
    """Markdown that says what the defense is, what it was judged against, and how to use it: from MLflow's registry, or
    from the ``folder`` that it lies in."""
    data, defense = config.data, find_defense(config.defense)
    return CARD.format(
        name=config.name,
        defense=defense.name,
        uri=folder or f"models:/{defense.name}-{config.name}@champion",
        which="" if folder else "  # the best; @candidate: the newest",
        trust="" if defense.name in DEFENSES and not is_own_code(config.target) else ", trust_code=True",
        description=defense.describe(config),
        channels=data.channels,
        height=data.height,
        width=data.width,
        classes=data.classes,
        data=data.uri or data.name,
        fingerprint=outcome["data"][:16],
        target=_target(config, outcome.get("target")),
        norm={"linf": "L-infinity", "l2": "L2"}[config.attack.norm],
        epsilon=config.attack.epsilon,
        seed=config.seed,
        code=_code(outcome, commit),
        table=markdown_table(outcome["results"]),
        suite=config.evaluation.suite,
        draws=max(row["draws"] for row in outcome["results"]),
    )
