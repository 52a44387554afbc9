"""A stored result is bound to the code that its attack and its defense import, and to no other; it is read once."""

from __future__ import annotations

import ast
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from dircluster.config import EvaluationConfig
from dircluster.defenses.base import Defended
from dircluster.defenses.dir import DEFENSE
from dircluster.distributed.deterministic import GlobalBatchNorm2d
from dircluster.evaluation import evaluation, provenance
from dircluster.evaluation.session import evaluate
from dircluster.evaluation.store import MemoryStore
from dircluster.evaluation.suites import AttackSpec
from dircluster.evaluation.victim import VictimModel
from dircluster.presets import preset

ATTACKS = ("natural", "pgd", "masked", "autoattack")


@pytest.fixture
def copy(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package whose source is looked at instead."""
    folder = tmp_path / "dircluster"
    shutil.copytree(root / "dircluster", folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    monkeypatch.setattr(provenance, "HERE", folder)
    forget()
    yield folder
    forget()


def forget() -> None:
    provenance.code_digest.cache_clear()
    for cached in (provenance._source, provenance._text, provenance._settings, provenance._imports):
        cached.cache_clear()


def defense() -> Defended:
    run = preset("digits_smoke")
    return DEFENSE.defended(run, {name: DEFENSE.build(run, name) for name in ("denoiser", "classifier")})


def digests() -> dict[str, str]:
    subjects = {
        "dir": VictimModel(defense(), "dir"),
        "plain": VictimModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "x"),
    }
    found = {}
    for name, victim in subjects.items():
        for attack in ATTACKS:
            found[f"{name} {attack}"] = evaluation.code(AttackSpec(attack), victim)
    return found


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """Digests of the package as it is, which are those of a copy."""
    return digests()


def test_settings_may_move_between_their_files(before: dict[str, str], copy: Path) -> None:
    evaluation, run = copy / "config" / "evaluation.py", copy / "config" / "run.py"
    text = evaluation.read_text()
    start = text.index("@dataclass(frozen=True)\nclass EvaluationConfig")
    evaluation.write_text(text[:start])
    run.write_text(run.read_text() + "\n\n" + text[start:])
    forget()
    assert "class EvaluationConfig" in run.read_text()
    assert digests() == before


OF_DIR = {f"dir {attack}" for attack in ATTACKS}
EVERY = OF_DIR | {f"plain {attack}" for attack in ATTACKS}


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "change", "voided"),
    [
        ("attacks/masked.py", "X = 1", {"dir masked", "plain masked"}),
        ("attacks/autoattack.py", "X = 1", {"dir autoattack", "plain autoattack"}),
        ("attacks/gradient.py", "X = 1", EVERY),
        ("models/masked_vit.py", "X = 1", OF_DIR),
        ("defenses/dir.py", "X = 1", OF_DIR),
        ("models/masking.py", "X = 1", OF_DIR),
        ("evaluation/victim.py", "X = 1", EVERY),
        ("evaluation/streams.py", "X = 1", EVERY),
        ("rng.py", "X = 1", EVERY),
        ("rng.py", "# said otherwise", set()),
        ("rng.py", '"""Said otherwise."""', set()),
        ("defenses/hgd.py", "X = 1", set()),
        ("evaluation/suites.py", "X = 1", set()),
        ("presets/dir.py", "class PretrainConfig: pass", set()),
        ("presets/dir.py", "class MaskingConfig: pass", OF_DIR),
    ],
)
def test_an_edit_voids_what_the_code_found(
    before: dict[str, str], copy: Path, file: str, change: str, voided: set[str]
) -> None:
    assert before.keys() == EVERY
    with (copy / file).open("a") as end:
        end.write(f"\n{change}\n")
    forget()
    after = digests()
    assert {name for name in EVERY if before[name] != after[name]} == voided


def test_imports_are_followed_wherever_they_stand(copy: Path) -> None:
    (copy / "one.py").write_text(
        "from typing import TYPE_CHECKING\nfrom dircluster import two\nimport torch\n"
        "if TYPE_CHECKING:\n    from dircluster.never import X\n"
        "def f():\n    from dircluster.three import g\n    import dircluster.one\n"
    )
    for name in ("two", "three", "never"):
        (copy / f"{name}.py").write_text("")
    found = set()
    for name in ("two", "three", "never"):
        before = provenance.code_digest(frozenset({"dircluster.one"}))
        (copy / f"{name}.py").write_text("X = 2")
        forget()
        if provenance.code_digest(frozenset({"dircluster.one"})) != before:
            found.add(name)
    assert found == {"two", "three"}
    alone = provenance.code_digest(frozenset(), frozenset({"dircluster.one"}))
    (copy / "two.py").write_text("X = 3")
    forget()
    assert provenance.code_digest(frozenset(), frozenset({"dircluster.one"})) == alone


def test_statistics_of_several_workers_are_no_other_model() -> None:
    classifier = defense().classifier
    assert provenance.modules_of(nn.Sequential(GlobalBatchNorm2d(2), classifier)) == provenance.modules_of(classifier)


def test_a_stored_result_is_read_once(digits: tuple[Tensor, Tensor]) -> None:
    class Counts(MemoryStore):
        def __init__(self) -> None:
            super().__init__()
            self.read: Counter[str] = Counter()

        def get(self, name: str) -> dict[str, Any] | None:
            self.read[name] += 1
            return super().get(name)

    store, module = Counts(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    few = EvaluationConfig(images=16, batch_size=8, steps=1, queries=5)
    first = evaluate(module, *digits, settings=few, store=store)
    assert max(store.read.values()) == 1
    store.read.clear()
    assert evaluate(module, *digits, settings=few, store=store).rows == first.rows
    assert set(store.read.values()) == {1}


def test_a_source_has_the_same_text_in_every_python() -> None:
    """Python 3.12 gave functions type parameters, 3.13 shows none that are empty: what a cluster shares has one key."""
    found = provenance.dumped(ast.parse("def f(x, *, y=0): return [x, None, 'y']"))
    assert found == (
        "Module(body=[FunctionDef(name='f', args=arguments(args=[arg(arg='x')], kwonlyargs=[arg(arg='y')], "
        "kw_defaults=[Constant(value=0)]), body=[Return(value=List(elts=[Name(id='x', ctx=Load()), Constant(), "
        "Constant(value='y')], ctx=Load()))])])"
    )
