"""jobs/replay.py: a row of a report, and the claims of the zoo, computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dircluster import zoo
from dircluster.cluster.commands import replay
from dircluster.cluster.version import commit
from tests.conftest import Trained
from tests.jobs import ROOT, run_job

CLAIMS = ROOT / "docs" / "claims"
DIGITS = [name for name in zoo.ZOO if name.startswith("digits-")]
ROWS = [
    (name, number)
    for name in DIGITS
    for number, seconds in enumerate(json.loads((CLAIMS / f"{name}.json").read_text())["seconds"], 1)
    if seconds < 60
]
"""Those that took less than a minute: AutoAttack takes ten."""

PRINTED = [
    *(("cifar10-small-at", f"none/{attack}/none") for attack in ("natural", "pgd20", "pgd20-margin")),
    *(("cifar10-small-dir", f"dir/natural/{randomness}") for randomness in ("fixed", "fresh")),
    *(("cifar10-small-hgd", f"hgd/{attack}/none") for attack in ("natural", "transfer-pgd20")),
    *(("cifar10-small-apegan", f"apegan/{attack}/none") for attack in ("natural", "pgd20")),
    ("cifar10-small-jatp", "jatp/pgd20/none"),
    ("cifar10-small-hgd", "hgd/pgd20/none"),
    *(("cifar10-small-nrp", f"nrp/{attack}/none") for attack in ("natural", "pgd20")),
]
"""Of "A small pair on all of CIFAR-10": those that take a minute or two."""


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What a replay printed, by the first word of each line."""
    return {line.partition(" ")[0]: line for line in capsys.readouterr().out.splitlines()}


def test_a_row_of_a_report_is_found_again(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commit() != ""
    monkeypatch.setattr("dircluster.cluster.version.commit", lambda: "a" * 40)  # this checkout may have changes
    words = ("--defense", trained.final, "--launcher", "local", "--storage.uri", str(trained.folder / "runs"))
    done = run_job("evaluate", "digits_smoke", *words, folder=tmp_path)
    assert done.code == 0, done.err
    file = Path(next(line for line in done.out.splitlines() if line.endswith(".json") and "report" in line).split()[-1])
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["facts"]["commit"] == "a" * 40
    names = [f"{row['defense']}/{row['attack']}/{row['randomness']}" for row in report["rows"]]
    for number, name in enumerate(names, 1):
        assert replay.main([str(file), str(number)]) == 0
        lines = said(capsys)
        assert name in lines["row"]
        assert "holds" in lines
        assert "the same to the bit" in lines["images"]
        assert lines["code"].endswith("as the row's")
        assert lines["machine"].endswith("as the row's")

    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps({**report, "rows": [report["rows"][1] | {"total": 8, "judged": 8}]}))
    replay.main([str(changed), "1"])
    assert "n = 8" in said(capsys)["again"]
    changed.write_text(json.dumps({**report, "rows": [report["rows"][1] | {"total": 900, "judged": 900}]}))
    assert replay.main([str(changed), "1"]) == 2
    assert "the row is of 900 images, and the settings of the report judge" in capsys.readouterr().err
    report["rows"][1]["sha256"] = "0" * 64
    changed.write_text(json.dumps(report))
    assert replay.main([str(changed), names[1]]) == 1
    lines = said(capsys)
    assert "DIFFERS" in lines
    assert "others" in lines["images"]
    monkeypatch.setattr("dircluster.cluster.version.commit", lambda: "a" * 40 + "+")
    report["facts"]["commit"] = "a" * 40 + "+"  # what the changes are is not known: held to the accuracy alone
    changed.write_text(json.dumps(report))
    assert replay.main([str(changed), names[1]]) == 0
    assert said(capsys)["code"].endswith("as the row's, but with changes that no commit holds")
    report["facts"]["commit"] = "f" * 40  # other code is held to the accuracy alone
    changed.write_text(json.dumps(report))
    assert replay.main([str(changed), names[1]]) == 0
    assert said(capsys)["code"].endswith(f"the row is of {'f' * 40}")

    for name, value, message in (("digest", "0", "is not the defense"), ("data", "0", "is of other images")):
        other = json.loads(file.read_text())
        other["facts"][name] = value
        changed.write_text(json.dumps(other))
        assert replay.main([str(changed), "1"]) == 2
        assert message in capsys.readouterr().err
    assert replay.main([str(file), "1", "--defense", "s3://me:CANARY@bucket/x"]) == 2
    refusal = capsys.readouterr().err
    assert "--defense must not hold a user or password" in refusal
    assert "CANARY" not in refusal


@pytest.mark.slow
@pytest.mark.parametrize(("name", "row"), PRINTED)
def test_what_is_printed_of_real_images_is_found_again(
    name: str, row: str, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of docs/results.md, whose table is that of the claims (tests/unit/test_docs.py)."""
    words = [str(CLAIMS / f"{name}.json"), row, "--data", str(real_data / "cifar10")]
    assert replay.main(words) == 0, capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), ROWS)
def test_what_the_zoo_claims_is_found_again(name: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of every small defense that comes with this package, as it is stored."""
    assert replay.main([str(CLAIMS / f"{name}.json"), str(number)]) == 0, capsys.readouterr().out
