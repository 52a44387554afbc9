"""The planted faults and the honest modules under the verdict: lines of Markdown, as docs/results.md has them.

python -m tests.unit.evaluation.planted_study
"""

from __future__ import annotations

import time

import torch

from dircluster.config import ConfigError
from tests.unit.evaluation.conftest import judged_digits
from tests.unit.evaluation.planted import FAULTS, HONEST
from tests.unit.evaluation.planted_later import LATER_FAULTS, LATER_HONEST, REFUSED
from tests.unit.evaluation.test_planted import judged, perceptron


def main() -> None:
    """Judge all, and print how many of each question's faults it flagged."""
    torch.set_num_threads(1)
    began, small, digits = time.monotonic(), perceptron(), judged_digits()
    counts: dict[str, list[str]] = {}
    for name, (made, question) in (FAULTS | LATER_FAULTS).items():
        try:
            named = question in {flag.question for flag in judged(made(small), digits).flags}
        except ConfigError as error:
            named = question == REFUSED and REFUSED in str(error)
        counts.setdefault(question, []).append(name if named else f"{name} (NOT FLAGGED)")
    print("| question | planted | flagged by it | faults |\n|---|---|---|---|")
    for question, names in counts.items():
        caught = sum("NOT FLAGGED" not in name for name in names)
        print(f"| {question} | {len(names)} | {caught} | {', '.join(names)} |")
    print("\n| honest module | flags | marks |\n|---|---|---|")
    for name, make in (HONEST | LATER_HONEST).items():
        found = judged(make(small), digits)
        print(f"| {name} | {len(found.flags)} | {sum(len(row.marks) for row in found.rows)} |")
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
