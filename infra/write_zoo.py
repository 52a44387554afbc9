"""A finished defense as one of the zoo: rounded to bf16, judged as it is stored, with its card and claims.

    python infra/write_zoo.py digits-dir RUNS/dir-.../final --preset digits --target digits-at [--suite quick] [...]
    python infra/write_zoo.py digits-dir [--suite quick] [...]

The second judges again what the zoo holds, by the code of today. Settings of the training stand in ``--with``, those of
the judging, such as --evaluation.images 1000, at the end; rows that --storage.uri holds already are taken from there.
It writes dircluster/zoo/NAME: weights, README.md, and the claims NAME.json and, with ``--target``, that of the target
which the defense protects. The claims go to docs/claims too, and the line of the table in dircluster/zoo is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from dircluster import cli, zoo
from dircluster.cluster.commands import evaluate
from dircluster.cluster.version import commit
from dircluster.config import ConfigError
from dircluster.defenses.table import find_defense
from dircluster.evaluation.model_card import markdown_table
from dircluster.presets import preset
from dircluster.training import checkpoint

CLAIMS = Path(__file__).parents[1] / "docs" / "claims"
CLASSIFIER = "classifier.safetensors"
CARD = """# zoo:{name}

{description}

- preset `{preset}`, seed {seed}{own}; trained by code {trained}, judged by code {judged} on {machine}
- threat: {norm}, epsilon {epsilon:.4g}; weights in bf16, rounded before they were judged; the target is `zoo:{target}`

{table}

```python
import dircluster

defense = dircluster.load_defense("zoo:{name}")
logits = defense(images)  # (N, C, H, W) in [0, 1] -> (N, classes)
```

It protects against noise of that size on images like those it was trained on, and against nothing else. A stronger
attack than those of suite `{suite}` may bring these accuracies further down, none can bring them up.
"""


def rounded(folder: Path, into: Path, made: dict[str, Any]) -> str:
    """The defense in ``folder``, rounded to bf16, committed ``into`` a folder: -> the SHA-256 of its manifest."""
    found = checkpoint.read(folder)
    if "defense" not in found.state:
        raise ConfigError(f"{folder} holds no finished defense")
    groups = {
        group: {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()}
        for group, tensors in found.tensors.items()
    }
    kept = {name: found.state[name] for name in ("defense", "stage")}
    return checkpoint.write(into, groups, kept | {"made": made}, "zoo")


def judged(words: list[str], uri: str) -> dict[str, Any]:
    """The claim of jobs/evaluate.py with ``words``, about ``uri`` instead of the folder that it was given."""
    with tempfile.TemporaryDirectory(prefix="write-zoo-") as folder:
        place = Path(folder)
        quiet = ["--launcher", "local", "--tracking.no-enabled"]
        if not any(word.partition("=")[0] == "--storage.uri" for word in words):
            quiet += ["--storage.uri", str(place / "runs")]
        code = evaluate.main([*words, *quiet, "--export", str(place / "claim.pt")])
        if code:
            sys.exit(code)
        claim: dict[str, Any] = json.loads((place / "claim.json").read_text())
    facts = claim["facts"]
    facts["settings"]["run"]["data"].pop("uri", None)  # where this machine keeps the images says nothing to others
    if facts["defense"] == "none":
        facts["settings"]["run"]["target"]["uri"] = uri
    else:
        facts["defense"] = uri
    return claim


def shipped_target(words: list[str], data: str) -> str:
    """The name of the zoo's target that a training with those settings was given; of digits, digits-at where none was.

    Raises ConfigError where it is none of the zoo's.
    """
    pairs = pairwise([*words, ""])
    given = [word.partition("=")[2] or after for word, after in pairs if word.partition("=")[0] == "--target.uri"]
    uri = given[-1] if given else "zoo:digits-at" if data == "digits" else ""
    if not zoo.is_shipped(uri):
        raise ConfigError("its target is not in the zoo: give --target NAME, or --with '--target.uri zoo:NAME'")
    zoo.find(uri)
    return uri.removeprefix("zoo:")


def described(words: list[str]) -> str:
    """What a card says of the defense that jobs/train.py with ``words`` trains. Raises ConfigError."""
    run = cli.parse(cli.TrainJob, words).run
    return find_defense(run.defense).describe(run)


def remembered(given: argparse.Namespace) -> None:
    """Fills in what the zoo's own folder says of how it was trained, and the target that it holds.

    Raises ConfigError where there is no such defense, or another command than jobs/train.py made it.
    """
    uri = f"zoo:{given.name}"
    made = checkpoint.read(zoo.folder_of(uri)).state["made"]
    command = made["command"].split()
    if command[:2] != ["python", "jobs/train.py"] or zoo.find(uri).folder != given.name:
        raise ConfigError(f"{uri} is no defense that jobs/train.py made: judge it with jobs/evaluate.py --export")
    given.preset, given.seed, given.trained = command[2], made["seed"], made["commit"]
    own = command[5:]  # after "--seed N"
    classifier = (zoo.HERE / given.name / CLASSIFIER).read_bytes()
    for name, shipped in zoo.ZOO.items():
        if shipped.bare and shipped.folder == given.name:
            given.target = name
        elif shipped.bare and (zoo.HERE / shipped.folder / CLASSIFIER).read_bytes() == classifier:
            own += [] if "--target.uri" in own else ["--target.uri", f"zoo:{name}"]
    given.settings_of_training = " ".join(own)


def main(argv: list[str]) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path, nargs="?", help="judged again as it is in the zoo when not given")
    parser.add_argument("--preset", help="that it was trained by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trained", default=commit(), help="the commit that trained it; this one when not given")
    parser.add_argument("--target", help="the name of its target alone in the zoo; one that is there when not given")
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--with", dest="settings_of_training", default="", help="the settings that it was trained with")
    given, settings = parser.parse_known_args(argv)
    if given.folder is not None and given.preset is None:
        parser.error("a new one needs --preset")
    into = zoo.HERE / given.name
    try:
        if given.folder is None:
            remembered(given)
        run, own = preset(given.preset), given.settings_of_training.split()
        target, description = given.target or shipped_target(own, run.data.name), described([given.preset, *own])
        if given.folder is not None:
            command = " ".join(["python jobs/train.py", given.preset, "--seed", str(given.seed), *own])
            rounding = "weights rounded to bf16"
            made = {"command": command, "commit": given.trained, "seed": given.seed, "precision": rounding}
            sha = rounded(given.folder, into, made)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    words = [given.preset, "--seed", str(given.seed), "--suite", given.suite, *own, *settings]  # the last one counts
    claims = {given.name: judged([*words, "--defense", str(into)], f"zoo:{given.name}")}
    if given.target:
        bare = [*words, "--defense", "none", "--target.uri", str(into)]
        claims[given.target] = judged(bare, f"zoo:{given.target}")
    for name, claim in claims.items():
        for folder in (into, CLAIMS):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(claim, indent=1) + "\n")
    claim = claims[given.name]
    threat = claim["facts"]["settings"]["run"]["attack"]
    card = CARD.format(
        name=given.name,
        description=description,
        preset=given.preset,
        seed=given.seed,
        own=f", `{' '.join(own)}`" if own else "",
        trained=given.trained,
        judged=claim["facts"]["commit"],
        machine=claim["facts"]["machine"],
        norm=threat["norm"],
        epsilon=threat["epsilon"],
        target=target,
        table=markdown_table(claim["rows"]),
        suite=given.suite,
    )
    (into / "README.md").write_text(card)
    if given.folder is None:
        return 0
    print(f'"{given.name}": Shipped("{given.name}", "{sha}"),')
    if given.target:
        print(f'"{given.target}": Shipped("{given.name}", "{sha}", bare=True),')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
