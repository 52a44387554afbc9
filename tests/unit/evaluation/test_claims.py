"""Claims and the leaderboard: what evidence a claim needs, which number stands in which column, what the pages show."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dircluster.cluster.commands import leaderboard as command
from dircluster.config import ConfigError, EvaluationConfig, with_values
from dircluster.evaluation.claims import Claim, claim_of, read_claim, read_claims
from dircluster.evaluation.html_report import robustbench_entry
from dircluster.evaluation.leaderboard import PAGE, by_threat, line, write_leaderboard
from dircluster.evaluation.session import evaluate
from dircluster.presets import preset, run_from_plain, run_to_plain
from dircluster.training.profiling import answer_costs

EPSILON = 0.01
NOTHING = {"accuracy": 0.0, "correct": 0, "interval": [0.0, 0.4]}
"""What a row says that leaves nothing of eight images."""
FEW = EvaluationConfig(images=8, batch_size=8, steps=2, draws=2, eot=2)


class Noisy(nn.Module):
    """A purifier that adds noise, in front of a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def restore(self, images: Tensor) -> Tensor:
        return images + 0.1 * torch.randn(images.shape)

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.classifier(self.restore(images))
        return made


@pytest.fixture(scope="module")
def claim() -> dict[str, Any]:
    """What --export writes of a defense, as JSON brings it back."""
    module, images = Noisy(), torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        labels = module.classifier(images).argmax(dim=1)
        found = evaluate(module, images, labels, epsilon=EPSILON, settings=FEW, name="noisy")
        costs = answer_costs(module, images)
    run = with_values(preset("digits"), {"attack.epsilon": EPSILON})
    facts = {"seed": 0, "commit": "a" * 40, "machine": found.evaluation.machine, "data": "d" * 64, "defense": "x:y"}
    facts |= {"digest": "e" * 64, "settings": run_to_plain(run)}
    made = claim_of(robustbench_entry(found, run), found, facts, costs)
    back: dict[str, Any] = json.loads(json.dumps(made))
    return back


def written(claim: dict[str, Any], folder: Path, name: str = "mine", **changes: Any) -> Path:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(claim | changes))
    return file


def test_an_export_is_a_claim_with_its_evidence(claim: dict[str, Any], tmp_path: Path) -> None:
    read = read_claim(written(claim, tmp_path))
    assert read.name == "mine"
    assert read.threat == ("linf", EPSILON)
    assert claim["costs"]["parameters"] == 650
    assert claim["costs"]["gmac"] == 640e-9
    assert claim["clean_acc"] == f"{100 * read.row('natural')['accuracy']:.2f}"  # type: ignore[index]
    assert not {"storage", "tracking", "scaling"} & set(read.run)  # where a run computes is nobody's business
    assert "torch" in read.facts["machine"]


def test_each_number_stands_in_its_column(claim: dict[str, Any], tmp_path: Path) -> None:
    read = read_claim(written(claim, tmp_path))
    known = [row for row in read.rows if row["protocol"] == "deterministic white box" and row["epsilon"]]
    assert {row["attack"] for row in known} == {"pgd2", "pgd2-margin", "malt"}
    assert read.row("white box")["attack"].startswith("pgd2")  # type: ignore[index]
    assert read.row("malt")["attack"] == "malt"  # type: ignore[index]
    assert read.row("fresh")["eot"] == 2  # type: ignore[index]
    assert read.row("autoattack") is read.row("wor") is read.row("vote") is None
    least = min(row["accuracy"] for row in read.rows if row["epsilon"] and "wor" not in row["attack"])
    assert read.strongest()["accuracy"] == least  # type: ignore[index]
    assert read.strongest_of_target()["attack"] in ("pgd2", "malt")  # type: ignore[index]
    cells = line(read)
    assert cells["AutoAttack"].text == ""
    assert cells["MALT"].text.startswith(f"{100 * read.row('malt')['accuracy']:.1f} (")  # type: ignore[index]
    assert "n = 8" in cells["MALT"].words


@pytest.mark.parametrize(("flags", "text"), [(None, ""), ([], "clean"), (["a bound", "numbers"], "2 flagged")])
def test_a_verdict_that_was_not_asked_is_none_that_was_passed(
    flags: Any, text: str, claim: dict[str, Any], tmp_path: Path
) -> None:
    cell = line(read_claim(written(claim, tmp_path, flags=flags)))["verdict"]
    assert (cell.text, cell.words) == (text, "; ".join(flags or []))
    clean, unasked, flagged = (
        line(Claim("x", {**claim, "flags": each}))["verdict"].value for each in ([], None, ["a bound"])
    )
    assert clean > unasked > flagged


def test_a_search_without_gradients_is_no_white_box(claim: dict[str, Any], tmp_path: Path) -> None:
    known = next(row for row in claim["rows"] if row["attack"] == "pgd2" and row["randomness"] == "fixed")
    found = known | {"attack": "square", **NOTHING}
    read = read_claim(written(claim, tmp_path, rows=[*claim["rows"], found]))
    assert read.row("white box")["attack"].startswith("pgd2")  # type: ignore[index]
    assert read.strongest()["accuracy"] == 0.0  # type: ignore[index]


def test_a_bare_target_is_a_claim_too(claim: dict[str, Any], tmp_path: Path) -> None:
    rows = [row for row in claim["rows"] if row["defense"] == "none"]
    read = read_claim(written(claim, tmp_path, defense="none", rows=rows))
    assert read.strongest() is not None
    assert read.strongest_of_target() is None
    assert read.row("white box")["protocol"] == "deterministic"  # type: ignore[index]


def test_what_is_its_own_target_does_not_stand_beside_itself(claim: dict[str, Any], tmp_path: Path, root: Path) -> None:
    """As a target that was trained on: the same attack makes the same images of both."""
    bare = [row for row in claim["rows"] if row["defense"] == "none"]
    read = read_claim(written(claim, tmp_path, rows=bare + [row | {"defense": claim["defense"]} for row in bare]))
    assert read.strongest() is not None
    assert line(read)["its target"].text == ""
    without = [{name: value for name, value in row.items() if name != "sha256"} for row in read.plain["rows"]]
    assert line(Claim("x", {**claim, "rows": without}))["its target"].text  # an older one, of which it is not known
    shipped = {claim.name: line(claim)["its target"].text for claim in read_claims(root / "docs" / "claims")}
    assert {name for name, text in shipped.items() if not text} == {
        *("cifar10-at", "cifar10-small-at", "digits-at", "cifar10-small-finetune")
    }


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "n": (lambda c: c["rows"][1].pop("total"), "row pgd2 of none has no n"),
    "no interval": (lambda c: c["rows"][2].pop("interval"), "has no interval"),
    "a wrong interval": (lambda c: c["rows"][2].update(interval=[0.0, 0.0]), "has no interval around its accuracy"),
    "an interval of more images": (
        lambda c: c["rows"][2].update(accuracy=0.5, interval=[0.49, 0.51]),
        "has an interval that is narrower than the 95 % one of 8 images",
    ),
    "counts": (lambda c: c["rows"][2].pop("correct"), "does not say of how many answers how many are correct"),
    "other counts": (
        lambda c: c["rows"][2].update(NOTHING, correct=c["rows"][2]["judged"]),
        "how many are correct, or has another accuracy",
    ),
    "digest": (lambda c: c["facts"].pop("digest"), "does not say its digest"),
    "seed": (lambda c: c["facts"].pop("seed"), "it has no seed"),
    "commit": (lambda c: c["facts"].pop("commit"), "it has no commit"),
    "changes": (lambda c: c["facts"].update(commit="a" * 40 + "+"), "code that no commit holds"),
    "attack": (lambda c: c["rows"][-1].pop("steps"), "does not say its attack's steps"),
    "eot": (lambda c: c["rows"][-1].update(eot=None), "does not say its attack's eot"),
    "machine": (lambda c: c["facts"].pop("machine"), "does not say its machine"),
    "radius": (lambda c: c["facts"]["settings"]["run"]["attack"].pop("epsilon"), r"no attack\.epsilon"),
    "accuracy": (lambda c: c["rows"][0].update(accuracy=float("nan")), "no accuracy in"),
    "rows": (lambda c: c.update(rows=[]), "it has no rows"),
    "its own rows": (lambda c: c.update(defense="other"), "no row is of other"),
    "facts": (lambda c: c.pop("facts"), "it has no facts"),
    "a known norm": (lambda c: c["facts"]["settings"]["run"]["attack"].update(norm="l1"), r"no attack\.norm, which is"),
    "a radius": (lambda c: c["facts"]["settings"]["run"]["attack"].update(epsilon="8/255"), r"no attack\.epsilon"),
    "objective": (lambda c: c["facts"]["settings"]["run"]["target"].pop("objective"), r"no target\.objective"),
    "costs": (lambda c: c["costs"].update(gmac="1.6"), "costs .* are no numbers"),
    "flags": (lambda c: c.update(flags=True), "its flags are no list"),
    "a number": (lambda c: c["rows"][-1].update(eot="20"), "does not say its attack's eot"),
    "randomness": (lambda c: c["rows"][-1].pop("randomness"), "does not say its attack's randomness"),
    "draws": (lambda c: c["rows"][-1].pop("worst"), "has no worst of its draws"),
    "one image": (lambda c: c["rows"][-1].update(total=True), "has no n"),
    "a control": (lambda c: c["rows"][-1].update(natural={"accuracy": 1.0}), "a control without its shares"),
    "a mark": (lambda c: c["rows"][-1].update(marks=["weak"]), "has marks or a luck that cannot be read"),
    "another radius": (lambda c: c["rows"][-1].update(epsilon=EPSILON / 2), "epsilon 0.005, but the claim is of 0.01"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_claim_without_evidence_is_refused_in_one_line(what: str, claim: dict[str, Any], tmp_path: Path) -> None:
    change, message = REFUSED[what]
    changed = json.loads(json.dumps(claim))
    change(changed)
    with pytest.raises(ConfigError, match=message) as refusal:
        read_claim(written(changed, tmp_path))
    assert "\n" not in str(refusal.value)


def test_the_pages_have_every_claim_those_that_keep_most_first(
    claim: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = json.loads(json.dumps(claim))
    for row in worse["rows"]:
        row |= NOTHING
    written(worse, tmp_path, "a-worse")
    written(claim, tmp_path, "b-better")
    written(claim, tmp_path, "c-other", dataset="others")
    page = tmp_path / "docs"
    page.mkdir()
    assert command.main([str(tmp_path), str(page)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    text = (page / "leaderboard.md").read_text()
    assert text.index("| b-better ") < text.index("| a-worse ")
    assert text.count("## digits, L-infinity, ε = 0.01") == text.count("## others, L-infinity, ε = 0.01") == 1
    shown = (page / "leaderboard.html").read_text()
    assert all(name in shown for name in ("a-worse", "b-better", "c-other"))
    (tmp_path / "d.json").write_text("[]")
    assert command.main([str(tmp_path), str(page)]) == 2
    assert command.main([str(tmp_path / "none"), str(page)]) == 2
    assert command.main([str(tmp_path), str(tmp_path / "nowhere")]) == 2
    (tmp_path / "d.json").unlink()
    assert command.main([str(tmp_path), "/proc"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize(
    ("norm", "epsilon", "radius"),
    [("linf", 8 / 255, "L-infinity, ε = 8/255"), ("linf", 0.15, "L-infinity, ε = 0.15"), ("l2", 1.0, "L2, ε = 1")],
)
def test_a_radius_is_of_pixels_where_the_ball_is_one_of_pixels(
    norm: str, epsilon: float, radius: str, claim: dict[str, Any]
) -> None:
    made = json.loads(json.dumps(claim))
    made["facts"]["settings"]["run"]["attack"] |= {"norm": norm, "epsilon": epsilon}
    assert list(by_threat([Claim("mine", made)])) == [f"digits, {radius}"]


def test_claims_of_different_data_of_somebodys_own_share_no_table(claim: dict[str, Any]) -> None:
    made = [json.loads(json.dumps(claim)) | {"dataset": "custom"} for _ in range(3)]
    for each, data in zip(made, ("a" * 64, "b" * 64, "a" * 64), strict=True):
        each["facts"]["data"] = data
    tables = by_threat([Claim(str(number), each) for number, each in enumerate(made)])
    assert [[found.name for found in table] for table in tables.values()] == [["0", "2"], ["1"]]
    assert next(iter(tables)).startswith("custom aaaaaaaa, ")


def test_the_page_sorts() -> None:
    if (program := shutil.which("node")) is None:
        pytest.skip("the page's script is not run: there is no node")
    script = re.findall(r"<script>(.*?)</script>", PAGE.read_text(), re.DOTALL)[0]
    rows = [{"cells": [{"dataset": {"value": value}, "textContent": text}]} for value, text in ((1, "a"), (3, "b"))]
    ask = f"const rows = {json.dumps([*rows, *rows[:1]])}; console.log(JSON.stringify([true, false].map("
    ask += "down => sorted(rows, 0, down).map(row => row.cells[0].dataset.value))))"
    done = subprocess.run([program, "-e", script + ask], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[3, 1, 1], [1, 1, 3]]


def test_the_leaderboard_of_the_documents_is_that_of_the_claims(root: Path, tmp_path: Path) -> None:
    for file in write_leaderboard(root / "docs" / "claims", tmp_path):
        assert file.read_text() == (root / "docs" / file.name).read_text(), "run python jobs/leaderboard.py"
    assert by_threat(read_claims(root / "docs" / "claims"))


def test_a_cell_of_fewer_images_says_so(root: Path) -> None:
    claim = read_claim(root / "docs" / "claims" / "cifar10-dir.json")
    cells = line(claim)
    few = claim.row("autoattack")
    assert few is not None
    assert few["total"] != int(cells["n"].text)
    assert cells["AutoAttack"].text.endswith(f"), n = {few['total']}")
    assert "n =" not in cells["natural"].text


def test_claims_that_were_made_before_are_read_by_the_code_as_it_is_now(root: Path) -> None:
    files = sorted((root / "docs" / "claims").glob("*.json"))
    made = [json.loads(file.read_text())["facts"]["settings"] for file in files]
    whole = [each for each in made if "training" in each["run"]]
    older = [
        {**each, "run": {**each["run"], "training": {**each["run"]["training"], "compile": False}}} for each in whole
    ]
    assert {run_from_plain(each).training.compile for each in older} == {"off"}  # the switch once had no auto
    for each in made:
        run_from_plain(each)
