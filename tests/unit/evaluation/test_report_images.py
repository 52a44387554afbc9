"""Every image in the report: what the page's script computes and shows, how large it is, and what is exported."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dircluster.config import ConfigError, EvaluationConfig, RunConfig
from dircluster.data.split import Split
from dircluster.evaluation.attack_table import AttackSpec
from dircluster.evaluation.export import check_export, exported, write_export
from dircluster.evaluation.html_report import SCRIPT, robustbench_entry, write_report
from dircluster.evaluation.marks import MEANING, Mark
from dircluster.evaluation.pictures import kept_pictures, pictured, read_pictures
from dircluster.evaluation.report_images import as_signs, check_same_data, image_table, read_report, sheets
from dircluster.evaluation.sample import judged_rows, row_numbers
from dircluster.evaluation.session import EvaluationReport, evaluate
from dircluster.evaluation.store import MemoryStore
from dircluster.evaluation.victim import VictimModel
from tests.unit.evaluation.conftest import EPSILON

FEW = EvaluationConfig(images=24, batch_size=8, steps=3, draws=4, eot=2)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
FACTS = {"data": "0" * 64, "defense": "mine", "commit": "abc"}


class Noisy(nn.Module):
    """A purifier that adds noise, in front of a classifier."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def restore(self, images: Tensor) -> Tensor:
        return images + 0.1 * torch.randn(images.shape)

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.classifier(self.restore(images))
        return made


@pytest.fixture(scope="module")
def found(at_model: nn.Module, digits: tuple[Tensor, Tensor]) -> EvaluationReport:
    store = MemoryStore(keep_images=True)
    return evaluate(Noisy(at_model), *digits, epsilon=EPSILON, settings=FEW, name="mine", store=store)


@pytest.fixture(scope="module")
def test(digits: tuple[Tensor, Tensor]) -> Split:
    return Split((digits[0] * 255).round().byte(), digits[1]).take(slice(24))


def written(found: EvaluationReport, test: Split, smoke: RunConfig, folder: Path, **more: Any) -> tuple[Path, Any]:
    config = dataclasses.replace(smoke, evaluation=FEW)
    victim = VictimModel(found.evaluation.victim.module, "mine")
    page, data = write_report(found, victim, test, config, FACTS, folder, None, lambda line: None, **more)
    return page, json.loads(data.read_text())


def node(script: str) -> Any:
    """What ``script`` prints as JSON after the page's own script, in Node.js."""
    if (program := shutil.which("node")) is None:
        pytest.skip("the page's script is not run: there is no node")
    done = subprocess.run([program, "-e", SCRIPT.read_text() + script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def clicked(page: Path, script: str, folder: Path) -> Any:
    """What ``script`` returns in a browser that shows ``page``, as JSON."""
    if CHROMIUM is None:
        pytest.skip("the page is not clicked through: there is no chromium")
    copy = folder / "clicked.html"
    tail = f"<script>document.title = JSON.stringify((() => {{ {script} }})())</script>"
    copy.write_text(page.read_text() + tail)
    words = [CHROMIUM, *BROWSER, f"--user-data-dir={folder / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300)
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    return json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def test_the_page_shows_what_was_found(found: EvaluationReport, test: Split, smoke: RunConfig, tmp_path: Path) -> None:
    page, plain = written(found, test, smoke, tmp_path)
    told = found.evaluation.shares(found.table[-1])
    attack = len(found.table) - 1
    seen = clicked(
        page,
        f"""
        const $ = (id) => document.getElementById(id), set = (id, value) => {{
          $(id).value = value; $(id).dispatchEvent(new Event("change")); }};
        const images = () => [...document.querySelectorAll("tr.image")].map((row) => Number(row.dataset.image));
        const all = images(), out = {{ all, pictures: document.querySelectorAll("tr.image .picture").length }};
        set("broken", {attack}); out.broken = images();
        set("broken", "none"); out.none = images();
        set("broken", ""); set("class", "3"); out.threes = images();
        set("class", ""); set("sort", "number"); out.numbers = images();
        document.querySelector("tr.image").click(); out.detail = document.querySelector("tr.detail").textContent;
        document.querySelector("tr.image").click(); out.closed = document.querySelector("tr.detail") === null;
        out.plots = document.querySelectorAll("svg.plot").length; out.changes = $("changes").hidden; return out;""",
        tmp_path,
    )
    assert sorted(seen["all"]) == seen["numbers"] == list(range(24))
    assert sorted(seen["broken"]) == [i for i in range(24) if told[i] < 0.5]
    attacked = [found.evaluation.shares(spec) for spec in found.table if spec.judged == "defense" and spec.epsilon]
    assert sorted(seen["none"]) == [i for i in range(24) if all(share[i] >= 0.5 for share in attacked)]
    fragility = torch.stack([1 - share for share in attacked]).mean(dim=0)
    assert fragility[seen["all"]].tolist() == sorted(fragility.tolist(), reverse=True)
    assert sorted(seen["threes"]) == [i for i in range(24) if test.labels[i] == 3]
    assert seen["pictures"] == 3 * 24
    predicted = found.evaluation.predicted(found.table[-1])["fresh"][0].tolist()
    assert seen["detail"].endswith(": " + " ".join(map(str, predicted)) + " ")
    assert (seen["closed"], seen["plots"], seen["changes"]) == (True, 1, True)
    assert plain["images"]["labels"] == "".join(map(str, test.labels.tolist()))


def test_pictures_are_of_attacks_on_what_the_defense_is_given(
    at_model: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    images, labels = digits[0][:8], digits[1][:8]
    few = dataclasses.replace(FEW, steps=1, queries=1)
    restored = AttackSpec("restored", "fresh", epsilon=0.9, steps=4, step_size=0.3, label="restored4")
    made = evaluate(Noisy(at_model), images, labels, epsilon=0.01, settings=few, attacks=[restored])
    assert made.evaluation.shares(restored).mean() < 0.5  # it would be the strongest
    shown = sheets(made, made.evaluation.victim, images, 0)
    assert shown is not None
    assert len(made.table) - 1 not in shown["row"]


def test_two_reports_side_by_side(found: EvaluationReport, test: Split, smoke: RunConfig, tmp_path: Path) -> None:
    _, plain = written(found, test, smoke, tmp_path)
    other = json.loads(json.dumps(plain))
    place = next(i for i, spec in enumerate(found.table) if spec.name == "transfer-pgd3")
    labels, row = other["images"]["labels"], other["images"]["rows"][place]
    row["fresh"] = "-" * 4 * 5 + "".join(4 * label for label in labels[5:])  # the first five broken, all others right
    page, _ = written(found, test, smoke, tmp_path / "two", other=("other", other))
    seen = clicked(
        page,
        """
        document.getElementById("changed").click();
        return [[...document.querySelectorAll("tr.image")].map((row) => Number(row.dataset.image)),
                [...document.querySelectorAll(".other")].at(PLACE).textContent]""".replace(
            "PLACE", str(place - len(found.table))
        ),
        tmp_path,
    )
    share = found.evaluation.shares(found.table[place])
    gained = [i for i in range(5) if share[i] >= 0.5]
    lost = [i for i in range(5, 24) if share[i] < 0.5]
    assert sorted(seen[0]) == gained + lost
    assert gained
    assert seen[1] == f"{100 * 19 / 24:.1f} (+{len(gained)} \N{MINUS SIGN}{len(lost)})"


def test_marks_controls_and_notes_are_shown(
    found: EvaluationReport, test: Split, smoke: RunConfig, tmp_path: Path
) -> None:
    place = next(i for i, row in enumerate(found.rows) if row.attack == "pgd3" and row.randomness == "fresh")
    rows = list(found.rows)
    rows[place] = dataclasses.replace(rows[place], marks=(Mark("gradient", 0.25),))
    marked = dataclasses.replace(found, rows=rows, notes=["the defense returns tuple"])
    _, plain = written(marked, test, smoke, tmp_path)
    page, _ = written(marked, test, smoke, tmp_path / "two", other=("other", plain))
    cells, note, other, heads, meaning = clicked(
        page,
        f"""
        const row = document.querySelectorAll("#rows tr")[{place} + 1], other = row.querySelector(".other");
        const heads = [...document.querySelectorAll("#rows th")].map((head) => head.textContent.trim());
        return [Object.fromEntries(heads.map((head, i) => [head, row.cells[i].textContent.trim()])),
          document.querySelector(".note").textContent, [other.title, other.querySelector(".flag").title],
          [...document.querySelectorAll("#head .flag")].map((mark) => mark.title),
          row.querySelector("b + .flag").title]""",
        tmp_path,
    )
    row, words = found.rows[place], "gradients missing, NaN or zero: 25.0 %"
    assert row.natural is not None
    assert row.noise is not None
    assert row.luck is not None
    assert cells["accuracy"] == f"{100 * row.accuracy:.1f} !"
    assert cells["protocol"] == "fresh draws"
    assert cells["marked"] == words
    assert cells["natural control"] == f"{100 * row.natural.accuracy:.1f}"
    assert cells["noise control"] == f"{100 * row.noise.accuracy:.1f}"
    assert cells["luck"] == f"{100 * row.luck:.1f}"
    assert "control" not in cells["how"]
    assert note == "Note: the defense returns tuple."
    assert other == [f"natural control {cells['natural control']}, luck {cells['luck']}", words]
    assert heads == [words]
    assert meaning == f"{words}. {MEANING['gradient']}"


def test_what_the_script_computes() -> None:
    row = {"defense": "defense", "attack": "a", "randomness": "fresh", "epsilon": 0.1}
    row["fresh"] = "00000000" + "1011--10" + "rrrr00rr"
    table = {"width": 2, "labels": "0010rr", "numbers": [4, 7, 9], "rows": [row]}
    found = node(
        f"""
        const one = prepared({json.dumps(table)});
        console.log(JSON.stringify([[...one.rows[0].share], [0, 1, 2].map((i) => classAt(one.labels, i, 2)),
          chosen(one, {{}}), chosen(one, {{ broken: "any" }}), byDraws(one, one.rows[0]), wilson(81 / 263, 263)]))"""
    )
    assert found[0] == [1, 0.5, 0.75]
    assert found[1] == [0, 36, 27 * 36 + 27]
    assert found[2:4] == [[1, 2, 0], []]
    assert [y for _, y, _ in found[4]["majority"]] == pytest.approx([1, 2 / 3, 2 / 3, 1])
    assert [y for _, y, _ in found[4]["all"]] == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3])
    assert found[5] == pytest.approx([0.2553, 0.3662], abs=1e-4)


def test_ten_thousand_images_are_computed_at_once() -> None:
    draws, images, rows = 20, 10_000, 20
    seconds, size = node(
        f"""
        const fresh = "1234567890".repeat({images * draws // 10}), labels = "1".repeat({images});
        const row = {{ defense: "defense", attack: "a", randomness: "fresh", epsilon: 1, fresh }};
        const table = {{ width: 1, labels, numbers: null, rows: Array({rows}).fill(row) }};
        const began = process.cpuUsage().user;
        const one = prepared(table); chosen(one, {{ broken: "any" }}); byDraws(one, one.rows[0]);
        console.log(JSON.stringify([(process.cpuUsage().user - began) / 1e6, JSON.stringify(table).length]))"""
    )
    assert size < 5e6
    assert seconds < 10  # of computing: less than one where nothing else runs, minutes if each image met all others


def test_classes_beyond_two_signs_have_three() -> None:
    module, labels = nn.Sequential(nn.Flatten(), nn.Linear(16, 1300)), torch.tensor([0, 1296, 1299])
    few = dataclasses.replace(FEW, steps=1)
    made = evaluate(module, torch.rand(3, 1, 4, 4), labels, epsilon=0.01, settings=few)
    shown = image_table(made, labels, range(3), "x")
    assert (shown["width"], shown["labels"]) == (3, "000" + "100" + "103")
    assert len(shown["rows"][0]["fixed"]) == 9


def test_signs_and_pictures_are_read_back() -> None:
    assert as_signs(torch.tensor([[0, 9], [35, -1]]), 1) == "09z-"
    assert as_signs(torch.tensor([36, -1, 1295]), 2) == "10--zz"
    images = torch.rand(6, 3, 4, 4)
    kept = kept_pictures(images, pictured(4, 4) - 2)
    assert kept is not None
    assert torch.equal(read_pictures(kept), (images[:2] * 255).round().byte())
    assert kept_pictures(images, pictured(4, 4)) is None
    assert pictured(224, 224) < 20


def test_a_sample_is_drawn_from_the_whole_split(at_model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    drawn, same, other = (row_numbers(128, EvaluationConfig(images=16, sample=seed)) for seed in (1, 1, 2))
    assert drawn == same == sorted(set(drawn)) != other
    assert len(drawn) == 16
    assert max(drawn) > 16
    assert judged_rows(128, EvaluationConfig(images=16)) == slice(16)
    settings = dataclasses.replace(FEW, images=16, sample=1)
    rows = evaluate(at_model, *digits, epsilon=EPSILON, settings=settings).rows
    chosen = evaluate(at_model, digits[0][drawn], digits[1][drawn], epsilon=EPSILON, settings=FEW).rows
    assert [row.sha256 for row in rows] == [row.sha256 for row in chosen]
    assert {row.sample for row in rows} == {1}
    with pytest.raises(ConfigError, match=r"evaluation\.images is missing"):
        EvaluationConfig(sample=1)


@pytest.mark.parametrize("kind", [".pt", ".npz"])
def test_what_is_exported_loads_without_pickle(found: EvaluationReport, test: Split, kind: str, tmp_path: Path) -> None:
    tensors = exported(found, test, range(24))
    claim = robustbench_entry(found, RunConfig())
    file, beside = write_export(tensors, claim, tmp_path / f"out{kind}")
    read = torch.load(file, weights_only=True) if kind == ".pt" else dict(np.load(file, allow_pickle=False))
    attacks = ("pgd3/fixed", "pgd3-margin/fixed", "malt/fixed", "pgd3/fresh", "transfer-pgd3/fresh")
    assert read.keys() == {
        *("images", "labels", "rows", "none/pgd3/none", "none/malt/none"),
        *(f"mine/{attack}" for attack in attacks),
    }
    made = torch.as_tensor(read["none/pgd3/none"])
    assert 0 < (made - torch.as_tensor(read["images"])).abs().max() <= EPSILON + 1e-6
    classifier = found.evaluation.victim.target
    assert classifier is not None
    right = (classifier(made).argmax(dim=1) == torch.as_tensor(read["labels"])).double().mean().item()
    assert right == found.rows[1].accuracy
    assert json.loads(beside.read_text())["clean_acc"] == claim["clean_acc"]


@pytest.mark.parametrize("kind", [".pt", ".npz"])
def test_a_disk_that_is_full_is_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"out{kind}").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"^--export .* cannot be written: \w.*$"):
        write_export({"images": torch.rand(64, 64, 64)}, {}, tmp_path / f"out{kind}")


@pytest.mark.parametrize("kind", [".pt", ".npz"])
def test_an_export_that_breaks_off_leaves_the_one_before(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"out{kind}"
    write_export({"images": torch.zeros(1)}, {"seed": 1}, file)
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}

    def full(place: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="No space left"):
        write_export({"images": torch.ones(1)}, {"seed": 2}, file)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.pt or \.npz"):
        check_export(tmp_path / "a.zip")
    with pytest.raises(ConfigError, match="its folder does not exist"):
        check_export(tmp_path / "no" / "a.pt")
    with pytest.raises(ConfigError, match=r"^--export /proc/a.pt cannot be written: \w"):
        check_export(Path("/proc/a.pt"))
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ConfigError, match=r"b\.json cannot be written: it is a folder$"):
        check_export(tmp_path / "b.pt")
    (tmp_path / "a.json").write_text('{"rows": []}')
    with pytest.raises(ConfigError, match="holds no outcomes of images"):
        read_report(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_report(tmp_path / "b.json")
    with pytest.raises(ConfigError, match="of other images"):
        check_same_data({"images": {"data": "1"}}, "2", tmp_path / "a.json")
