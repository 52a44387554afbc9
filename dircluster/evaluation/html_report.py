"""The report of an evaluation: one HTML page that stands alone and shows every image, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dircluster.config import RunConfig, digest, to_dict
from dircluster.data.split import Split
from dircluster.defenses.base import Defended
from dircluster.evaluation import figures
from dircluster.evaluation.marks import MEANING, explained, in_words
from dircluster.evaluation.pictures import data_uri
from dircluster.evaluation.report_images import image_table, sheets, without_pictures
from dircluster.evaluation.results import images_of, n_of, to_plain, worst_attacked
from dircluster.evaluation.session import EvaluationReport
from dircluster.evaluation.suites import how
from dircluster.evaluation.victim import VictimModel
from dircluster.models.modules import device_of

SHOWN, EMBEDDED, DISCARDED = 8, 200, 256
"""Images in the pictures, in the embedding (natural and adversarial each), and behind Figure 2."""

PAGE, SCRIPT = (Path(__file__).with_name(f"html_report.{kind}") for kind in ("html", "js"))


def write_report(
    report: EvaluationReport,
    victim: VictimModel,
    test: Split,
    config: RunConfig,
    facts: dict[str, Any],
    folder: Path,
    natural_target: nn.Module | None,
    say: Callable[[str], None],
    numbers: Sequence[int] | None = None,
    other: tuple[str, Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Write report.html and report.json into ``folder``: -> their paths. ``say`` gets what is left out.

    ``test`` holds the images judged, ``numbers`` their rows in the test split, the first ones when not given. ``other``
    is the name and the JSON of another report, to be shown beside this one.
    """
    from jinja2 import Environment

    from dircluster.files import write_whole

    printed = config.printed if _as_trained(config, victim) else {}
    plain = report.to_plain()
    for row in plain["rows"]:
        row["published"] = printed.get(row["defense"], {}).get(without_draws(row["attack"]))
    drawn, measured = _figures(report, victim, test, config, natural_target, say)
    judged = report.evaluation.images
    images = image_table(report, test.labels[:judged], numbers or range(judged), facts["data"])
    images["classes"] = list(facts.get("classes", ()))  # their names by label, where the data says them
    shown = sheets(report, victim, test.pixels(slice(judged)), config.seed)
    inside = {"images": images, "curves": plain["curves"], "sheets": shown and without_pictures(shown)}
    if other is not None:
        inside["other"] = {"images": other[1]["images"], "curves": other[1].get("curves", {})}
    kinds = {mark.kind for row in report.rows for mark in row.marks}
    page = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8"))
    html = page.render(
        name=config.name,
        suite=report.suite,
        seed=report.seed,
        chosen=images_of(plain["rows"][0]),
        data=config.data.uri or config.data.name,
        facts=facts,
        notes=plain["notes"],
        rows=plain["rows"],
        controls=any(row["natural"] for row in plain["rows"]),
        marks=[meaning for kind, meaning in MEANING.items() if kind in kinds],
        seconds=report.seconds,
        any_published=any(row["published"] is not None for row in plain["rows"]),
        verdict=plain["verdict"],
        flags=len(report.flags),
        verdict_images=min(config.evaluation.verdict_images, len(test)),
        figures=drawn,
        pictures=shown and shown["count"],
        sheets=shown["sheets"] if shown else {},
        purified=victim.target is not None,
        other=other and {"name": other[0]},
        page_data=json.dumps(inside).replace("<", "\\u003c"),  # nothing in it ends the element that holds it
        script=SCRIPT.read_text(encoding="utf-8"),
        pc=lambda share: f"{100 * share:.1f}",
        how=how,
        n_of=n_of,
        in_words=in_words,
        explained=explained,
    )
    whole = {
        **plain,
        "facts": facts,
        "figures": measured,
        "images": images,
        "robustbench": robustbench_entry(report, config, victim.passes),
    }
    name = f"report-{report.suite}-{digest([whole['rows'], whole['verdict']])[:6]}"  # other settings, another report
    paths = [folder / f"{name}.html", folder / f"{name}.json"]
    for path, text in zip(paths, (html, json.dumps(whole, indent=1)), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    return paths


def without_draws(attack: str) -> str:
    """A row's attack as a preset's printed numbers name it: the paper does not say how many draws it averages over."""
    return attack.split("-eot")[0]


def _as_trained(config: RunConfig, victim: VictimModel) -> bool:
    """Whether the victim's networks are those that ``config`` says: of one that knows no settings nothing is known."""
    settings = victim.module.settings if isinstance(victim.module, Defended) else None
    return settings is not None and settings.items() <= to_dict(config).items()


def robustbench_entry(report: EvaluationReport, config: RunConfig, passes: int = 1) -> dict[str, Any]:
    """The defense in the form of RobustBench's model_info; its figures are this report's, not the leaderboard's.

    ``autoattack_acc`` is AutoAttack standard's on fixed draws; None where the suite has not run it.
    """
    own = [row for row in report.rows if row.defense == report.defense]
    natural = next((row for row in own if row.attack == "natural"), None)
    auto = next((row for row in own if row.attack == "autoattack-standard"), None)
    threat, epsilon = config.attack.norm, config.attack.epsilon
    worst = worst_attacked(to_plain(own), threat)
    return {
        "link": None,
        "name": config.name,
        "authors": None,
        "venue": None,
        "additional_data": False,
        "number_forward_passes": passes,
        "dataset": config.data.name,
        "architecture": report.defense,
        "eps": f"{255 * epsilon:.4g}/255" if threat == "linf" else f"{epsilon:.4g}",
        "clean_acc": None if natural is None else f"{100 * natural.accuracy:.2f}",
        "reported": None if worst is None else f"{100 * worst['accuracy']:.2f}",
        "autoattack_acc": None if auto is None else f"{100 * auto.accuracy:.2f}",
        "unreliable": bool(report.flags) if report.verdict else None,
        "footnote": "; ".join(flag.question for flag in report.flags) or None,
    }


def _figures(
    report: EvaluationReport,
    victim: VictimModel,
    test: Split,
    config: RunConfig,
    natural_target: nn.Module | None,
    say: Callable[[str], None],
) -> tuple[list[tuple[str, str, str]], dict[str, Any]]:
    """Title, text and picture of each figure, and what was measured for them."""
    drawn: list[tuple[str, str, str]] = []
    measured: dict[str, Any] = {}
    steps, attack, seed = config.evaluation.steps or 20, config.attack, config.seed
    device = device_of(victim.module)
    images, labels = test.pixels(slice(DISCARDED)).to(device), test.labels[:DISCARDED].to(device)
    if victim.target is not None:
        few = slice(SHOWN)
        rows, outside = figures.restoration(victim, images[few], labels[few], attack, steps, seed)
        measured["restored_pixels_outside_0_1"] = outside
        text = f"{100 * outside:.0f} % of the restored pixels lie outside [0, 1]; pictures are cut to it."
        drawn.append(("Restored images (Figures 4 and 7)", text, data_uri(figures.draw_images(rows))))
        drawn.append(_embedding(victim, images[:EMBEDDED], labels[:EMBEDDED], config, say))
    bare = victim.target if isinstance(victim.target, nn.Module) else None if victim.target else victim.module
    if bare is not None:
        targets = {"target": bare} | ({} if natural_target is None else {"natural target": natural_target.to(device)})
        shares = figures.discarded_noise(targets, images, labels, attack, steps, seed)
        measured["discarded_noise"] = {"shares": list(figures.SHARES), **shares}
        missing = "" if natural_target is not None else " Give --natural-target to see a naturally trained one."
        text = f"Noise on the bare target, a random share of its pixels discarded; n = {len(images)}.{missing}"
        drawn.append(("How much noise must go (Figure 2)", text, data_uri(figures.draw_shares(shares))))
    return drawn, measured


def _embedding(
    victim: VictimModel, images: torch.Tensor, labels: torch.Tensor, config: RunConfig, say: Callable[[str], None]
) -> tuple[str, str, str]:
    rows, _ = figures.restoration(victim, images, labels, config.attack, config.evaluation.steps or 20, config.seed)
    points = figures.embedding(torch.cat([rows["restored natural"], rows["restored"]]), config.seed)
    title = "Restored images, embedded (Figure 5)"
    if points is None:
        say("the report has no UMAP: umap-learn is not installed (pip install umap-learn)")
        return title, "Left out: umap-learn is not installed.", ""
    adversarial = torch.arange(len(points)) >= len(images)
    text = f"UMAP of {len(images)} images, natural and adversarial, after restoration; a color a class."
    return title, text, data_uri(figures.draw_embedding(points, labels.cpu().repeat(2), adversarial))
