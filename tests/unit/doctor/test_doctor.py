"""The whole doctor as a person calls it: a line a check, JSON, a page, exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dircluster.cluster.commands import doctor
from dircluster.doctor import checkup, devices, numerics
from dircluster.doctor.findings import Check, Finding, at_most, seen, skipped
from dircluster.doctor.page import to_html
from tests.jobs import run_job

CHECKS = {
    *("packages", "free memory", "copy", "products in bf16", "attention, T = 17, bf16", "output of g, h, h(g) in fp32"),
    *("draws of dir unlike the CPU's", "equal predictions in bf16", "resumed weights, apart", "compiled steps"),
    *("dir, batch 16", "EOT, batched against calls", "top 1 of dir", "several devices"),
}


@pytest.mark.long
def test_it_examines_a_small_run_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One check is broken: it is a failed line, and all others are there. Two processes have a test of their own."""

    def broken(*given: object) -> None:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(numerics, "agreement", broken)
    monkeypatch.setattr(devices, "cores", lambda: 1)
    found = run_job("doctor", "digits_smoke", "--seconds", "2400", "--scaling.threads", "1", folder=tmp_path)
    assert (found.code, found.err) == (1, "")
    rows = {row["name"]: row for row in found.summary["findings"]}
    assert set(rows) >= CHECKS - {"output of g, h, h(g) in fp32"}
    assert [name for name, row in rows.items() if row["status"] == "fail"] == ["agreement with the CPU"]
    assert rows["agreement with the CPU"]["note"] == "RuntimeError: the driver is gone"
    assert rows["step at which a killed run went on"]["figure"] >= 1
    assert rows["resumed weights, apart"]["figure"] == 0
    timed = {f"{stage}, batch {size}" for stage in ("target", "pretrain", "dir") for size in (4, 16)}
    assert {name for name in rows if ", batch " in name} == timed
    assert all(rows[name]["figure"] > 0 for name in timed)
    assert rows["several devices"]["note"] == "there are neither GPUs nor two CPUs"
    lines = found.out.splitlines()
    assert lines[0].startswith("digits_smoke on CPU, 1 threads, at most 2400 s")
    assert [re.split(r"  +", line)[1] for line in lines[2:-1]] == list(rows)
    assert lines[-1].startswith("This machine does not train as it should: ")
    page = (tmp_path / "summary.html").read_text()
    assert all(name.replace("'", "&#39;") in page for name in rows)
    assert not re.search(r"(src|href)=", page)


def test_a_page_says_nothing_that_it_was_not_told() -> None:
    page = to_html([at_most("<b>", 2.0, 1.0, note="a & b")], {"preset": "digits", "device": "CPU"}, "Broken")
    assert "&lt;b&gt;" in page
    assert "a &amp; b" in page
    assert '<td class="fail">fail' in page


@pytest.mark.parametrize(
    ("findings", "code", "verdict"),
    [
        ([seen("a")], 0, "This machine trains as it should"),
        ([skipped("a", "its time is up")], 0, "Nothing was looked at: "),
        ([seen("a"), Finding("b", "warn")], 0, "No check failed, but some warn: "),
        ([Finding("a", "fail"), seen("b")], 1, "This machine does not train"),
    ],
)
def test_the_exit_code_is_that_of_failures(
    findings: list[Finding],
    code: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(checkup, "checks", lambda *given: [Check("all", lambda: findings, 9)])
    assert doctor.main(["digits_smoke", "--scaling.threads", "1"]) == code
    assert capsys.readouterr().out.splitlines()[-1].startswith(verdict)


@pytest.mark.parametrize("page", ["", "full"])
def test_the_page_beside_the_summary(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkup, "checks", lambda *given: [Check("all", lambda: [seen("a")], 9)])
    words = ["digits_smoke", "--scaling.threads", "1", "--summary"]
    assert doctor.main([*words, "/dev/null"]) == 0  # beside a device lies no page
    assert not Path("/dev/null.html").exists()
    if page:
        (tmp_path / "s.html").symlink_to(f"/dev/{page}")
    assert doctor.main([*words, str(tmp_path / "s.json")]) == (2 if page else 0)
    line = f"error: {tmp_path}/s.html, the page beside --summary, cannot be written: No space left on device\n"
    assert capsys.readouterr().err == (line if page else "")
    assert json.loads((tmp_path / "s.json").read_text())["findings"]
    if not page:
        assert (tmp_path / "s.html").read_text().startswith("<!")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "unknown preset 'nope'"),
        (["--seconds", "0"], "--seconds must be positive and at most 1e+09, got 0"),
        (["--seconds", "1e300"], "--seconds must be positive and at most 1e+09, got 1e+300"),
        (["--summary", "nowhere/s.json"], "its folder does not exist"),
        (["--summary", "s.html"], "give it another suffix"),
        (["--summary", "folder.json"], "folder.html, the page beside --summary, cannot be written: it is a folder"),
        (["--masking.ratio", "50"], "did you mean 0.5?"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.html").mkdir()
    assert doctor.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_a_preset_it_is_what_the_machine_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert doctor._with_preset(["--seed", "1"]) == ["cifar10", "--seed", "1"]
    assert doctor._with_preset(["svhn"]) == ["svhn"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor._with_preset([]) == ["digits"]
