"""The documents keep their word: examples run, commands parse, links lead somewhere, lines are short."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dircluster.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "infra" / "README.md"])
COLUMNS = 100


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose_and_code(text: str) -> Iterator[tuple[int, str, bool]]:
    """Line numbers and lines, and whether each is code: fenced, or indented by four after an empty line or code."""
    fenced, code, inside, empty = False, False, 0, True
    for number, line in enumerate(text.splitlines(), 1):
        words, indent = line.strip(), len(line) - len(line.lstrip())
        if words.startswith("```"):
            fenced = not fenced
            yield number, line, True
            continue
        if fenced:
            yield number, line, True
            continue
        if not words:
            empty = True
            yield number, line, code
            continue
        code = indent >= inside + 4 and (empty or code)
        if not code:
            marker = re.match(r" *(?:[-*]|\d+[.)]) +", line)
            inside = len(marker[0]) if marker else inside if indent and indent >= inside else 0
        empty = False
        yield number, line, code


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, each with empty lines before it so that line numbers are the page's."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: block.start(1)].count("\n") + block[1] for block in found]


def commands() -> Iterator[tuple[str, str]]:
    """Every ``python jobs/NAME.py ...`` or torchrun's that stands on a line of code: page and line, and the command.

    Not replay's, whose words are a file that a reader has and a row of it.
    """
    for place, whole in lines_of_code():
        if found := re.match(
            r"(?:.*? -- )?(?:python|torchrun --nproc-per-node \d+) (jobs/(?!replay)\w+\.py .*)", whole
        ):
            yield place, found[1].rstrip("'")


def lines_of_code() -> Iterator[tuple[str, str]]:
    """Page and line number, and the line; one that ends in a backslash is one with the next."""
    for page in PAGES:
        waiting = ""
        for number, line, code in prose_and_code(page.read_text(encoding="utf-8")):
            whole = waiting + line.strip() if code else ""
            waiting = whole[:-1] if whole.endswith("\\") else ""
            if whole and not waiting:
                yield f"{name_of(page)}:{number}", whole


def slug(heading: str) -> str:
    """The anchor of a heading, as it is made on the pages of code hosts."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def test_there_are_pages_with_the_names_that_one_guesses() -> None:
    names = {name_of(page) for page in PAGES}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= names
    assert {f"docs/{name}.md" for name in ("api", "extend", "operate", "glossary", "faq", "results")} <= names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_wraps(page: Path) -> None:
    long = [
        f"{name_of(page)}:{number}"
        for number, line, code in prose_and_code(page.read_text(encoding="utf-8"))
        if len(line) > COLUMNS and not code and not line.lstrip().startswith(("|", "![")) and " " in line.strip()
    ]
    assert not long, f"longer than {COLUMNS} columns"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = "\n".join(line for _, line, code in prose_and_code(page.read_text(encoding="utf-8")) if not code)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = page if not path else page.parent / path
        if not target.exists():
            broken.append(link)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor not in {slug(heading) for heading in headings}:
                broken.append(link)
    assert not broken


def messages() -> list[str]:
    """Every text of the package's source, with NUL where a value is filled in."""

    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) or "\0" for part in node.values)
        return None

    trees = (ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / "dircluster").rglob("*.py"))
    return [found for tree in trees for node in ast.walk(tree) if (found := text(node))]


def test_what_you_see_is_what_the_code_says() -> None:
    table = (ROOT / "docs" / "operate.md").read_text(encoding="utf-8").partition("## Trouble")[2]
    seen = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    phrases = [phrase for cell in seen for phrase in re.findall(r"`([^`]+)`", cell)]
    assert len(phrases) > 50
    known, missing = messages(), []
    for phrase in phrases:
        pattern = re.sub(r"(?<![\w(])(\d\S*|[NXY])(?!\w)", "(?:\\1|\0)", re.escape(phrase).replace(r"\ ", " "))
        pattern = pattern.replace(r"\.\.\.", ".*")
        if not any(re.search(pattern, message, re.DOTALL) for message in known):
            missing.append(phrase)
    assert not missing


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(("place", "command"), list(commands()), ids=lambda value: value.split(" ")[0])
def test_commands_are_understood(
    place: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *words = shlex.split(command, comments=True)
    words = [word for word in words if word not in ("&", "...")]
    monkeypatch.setattr(sys, "argv", [script, *words, "--print-config"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0, f"{place}: {capsys.readouterr().err}"


def test_what_make_and_python_are_asked_for_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made, modules = set[str](), set[str]()
    for _, line in lines_of_code():
        made |= set(re.findall(r"^make ([a-z][\w-]*)", line))
        modules |= set(re.findall(r"\bpython -m ([\w.]+)", line))
    assert {"train", "test", "cluster"} <= made <= targets
    assert modules
    assert not [name for name in modules if importlib.util.find_spec(name) is None]


@pytest.mark.long
def test_the_examples_of_extend_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "extend.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {"__name__": "extend"}
    for block in blocks(page):
        if named := re.match(r"# ([\w/]+\.py)\n", block.lstrip()):
            (tmp_path / named[1]).parent.mkdir(exist_ok=True)
            (tmp_path / named[1]).write_text(block.lstrip())
        else:
            exec(compile(block, name_of(page), "exec"), names)
    assert (tmp_path / "myspace.py").is_file()


@pytest.mark.long
@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "api.md"], ids=name_of)
def test_the_examples_that_a_reader_copies_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, name_of(page), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_blocks_are_python(page: Path) -> None:
    for block in blocks(page):
        compile(block, name_of(page), "exec")


SMALL = {
    "natural, masks fixed": ("natural", "fixed"),
    "natural, fresh masks": ("natural", "fresh"),
    "PGD-20, deterministic white box": ("pgd20", "fixed"),
    "PGD-20 by the margin loss": ("pgd20-margin", "fixed"),
    "PGD-20, fresh masks, EOT 4": ("pgd20", "fresh"),
    "PGD-20 from the target alone": ("transfer-pgd20", "fresh"),
    "MALT": ("malt", "fixed"),
}
"""Lines of the table of the small systems on CIFAR-10, and the rows of claims that they show."""


def test_the_table_of_the_small_systems_is_that_of_their_claims() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    lines = page.partition("### A small pair on all of CIFAR-10")[2].partition("\n### ")[0].splitlines()
    head, _, *table = ([part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    systems = ["none", *(words.split()[0].lower().replace("-", "") for words in head[2:])]
    assert [row[0] for row in table] == list(SMALL)
    claims = {name: small_rows("at" if name == "none" else name) for name in systems}
    for words, *cells in table:
        attack, randomness = SMALL[words]
        bare = claims["none"].get(("none", attack.removeprefix("transfer-"), "none"))
        for system, cell in zip(systems, cells, strict=True):
            drawn = randomness if system == "dir" or attack.startswith("transfer") else "fixed"
            row = claims[system].get((system, attack, drawn if system == "dir" else "none"))
            if row is None or (randomness == "fresh" and drawn == "fixed"):
                assert cell == "", (words, system)
                continue
            low, high = (100 * end for end in row["interval"])
            told = f"{100 * row['accuracy']:.1f} ({low:.1f}-{high:.1f})"
            gain = f", {100 * (row['accuracy'] - bare['accuracy']):+.1f}".replace("+0.0", "0.0") if bare else ""
            assert cell.translate({0x2212: "-", 0x2013: "-", ord("*"): None}) in {told, told + gain}, (words, system)


def test_the_small_presets_say_what_the_claims_do() -> None:
    one, of = r"(\d\d\.\d)", r",?(?: of (\d\d\.\d) and (\d\d\.\d))?"
    form = rf"{one} % natural and {one} % under MALT{of} .*?``zoo:cifar10-small-(\w+)``"
    presets = [name for name in PRESETS if name.startswith("cifar10_small") and not name.endswith("smoke")]
    bare = [f"{100 * small_rows('at')['none', attack, 'none']['accuracy']:.1f}" for attack in ("natural", "malt")]
    assert len(presets) > 5
    for name in presets:
        found = re.search(form, " ".join((PRESETS[name].__doc__ or "").split()))
        assert found, name
        *said, system = found.groups()
        rows = [row for row in small_rows(system).values() if row["attack"] in ("natural", "malt")]
        its = {row["attack"]: row for row in rows if row["defense"] != "none" and row["randomness"] != "fresh"}
        if its:
            assert said == [f"{100 * its[attack]['accuracy']:.1f}" for attack in ("natural", "malt")] + bare, name
        else:
            assert said == [*bare, None, None], name


def small_rows(name: str) -> dict[tuple[str, str, str], Any]:
    """The rows of the claim of a small system, by defense, attack and randomness."""
    claim = json.loads((ROOT / "docs" / "claims" / f"cifar10-small-{name}.json").read_text())
    return {(row["defense"], row["attack"], row["randomness"]): row for row in claim["rows"]}
