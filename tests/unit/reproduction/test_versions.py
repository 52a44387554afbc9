"""What trained and judged each system, as far as it was recorded."""

from __future__ import annotations

from dircluster.cluster.sweeps.store import key_of
from dircluster.reproduction.cells import Outcome
from dircluster.reproduction.page import to_html, to_markdown
from dircluster.reproduction.plan import make_plan
from dircluster.reproduction.tables import exhibits
from dircluster.reproduction.versions import several, versions_of

OLD, NEW = "a" * 40, "b" * 40 + "+"


def claim(commit: str) -> dict[str, dict[str, str]]:
    return {"facts": {"commit": commit}}


def test_one_version_needs_no_line_and_others_do() -> None:
    plan = make_plan([exhibits("cifar10")["table2"]], "digits_smoke", {}, (0,), ("identity", "dir"), key_of)
    trained = {"target": [OLD], "pretrain": [OLD], "dir": [OLD]}
    same = {u.key: Outcome(claim=claim(OLD), trained_by={**trained, "identity": [OLD]}) for u in plan.all}
    assert several(versions_of(plan, same)) == ""

    there = dict(same)
    keys = {unit.name: unit.key for unit in plan.all}
    there[keys["dir, seed 0"]] = Outcome(claim=claim(NEW), trained_by={**trained, "dir": [OLD, NEW]})
    there[keys["identity, objective trades, seed 0"]] = Outcome()  # nothing was recorded
    there[keys["dir onto trades, seed 0"]] = Outcome(claim=claim(NEW), trained_by={**trained, "trades target": []})
    there[keys["dir onto mart, seed 0"]] = Outcome(error="no luck")
    found = versions_of(plan, there)
    texts = {each.system: each.to_texts() for each in found}
    assert texts["dir, seed 0"] == {
        "system": "dir, seed 0",
        "trained by": f"target: {'a' * 9}; pretrain: {'a' * 9}; dir: {'a' * 9}, {'b' * 9}+",
        "judged by": f"{'b' * 9}+",
    }
    unrecorded = texts["identity, objective trades, seed 0"]
    assert (unrecorded["trained by"], unrecorded["judged by"]) == ("unknown", "unknown")
    assert texts["dir onto trades, seed 0"]["trained by"].endswith("trades target: unknown")
    assert "dir onto mart, seed 0" not in texts
    assert f"more than one version of the code ({'a' * 9}, {'b' * 9}+, unknown)" in several(found)
    (plain,) = (each.to_plain() for each in found if each.system == "dir, seed 0")
    assert plain["trained_by"]["dir"] == (OLD, NEW)

    for page in (to_markdown("Table 2", {}, [], [], found), to_html("Table 2", {}, [], [], found)):
        assert f"dir: {'a' * 9}, {'b' * 9}+" in page
        assert "unknown for what was trained before that was recorded" in " ".join(page.split())
    assert "Code" not in to_markdown("Table 2", {}, [], [], [])
