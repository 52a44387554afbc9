"""One call behind jobs/submit.py: look at what would be sent, then let Ray send it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dircluster import cli
from dircluster.config import ConfigError

USAGE = """usage: python jobs/submit.py [--send-secrets] [OPTIONS OF ray job submit] -- python jobs/train.py ...

Submit the working directory and a command to a Ray cluster, as ray job submit --working-dir . does, unless a file among
those that would be sent looks like a secret. What .rayignore and .gitignore name is not sent."""
SHOWN = 5
"""Files that the line names."""


def main(argv: Sequence[str]) -> int:
    """Submit what ``argv`` says; -> exit code, where it does not become Ray's. Errors are one line on stderr."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        words = checked(argv)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    ray = str(Path(sys.executable).with_name("ray"))
    return os.execv(ray, [ray, "job", "submit", *words])


def checked(argv: Sequence[str]) -> list[str]:
    """The words that follow ``ray job submit``. Raises ConfigError where a file that looks like a secret would go."""
    cut = argv.index("--") if "--" in argv else len(argv)
    options, command = list(argv[:cut]), list(argv[cut:])
    if not command:
        raise ConfigError("the command is missing: end with -- python jobs/train.py ...")
    careless = "--send-secrets" in options
    options = [word for word in options if word != "--send-secrets"]
    folder = cli.value_of("--working-dir", options)
    if not folder:
        folder, options = ".", ["--working-dir", ".", *options]
    if "://" not in folder and not folder.endswith(".zip"):
        _look_at(Path(folder), careless)
    return [*options, *command]


def _look_at(folder: Path, careless: bool) -> None:
    from dircluster.cluster.runtime.upload import files_sent
    from dircluster.cluster.working_dir import large_among, secrets_among

    if not folder.is_dir():
        raise ConfigError(f"--working-dir {folder} is no folder")
    files = files_sent(folder)
    found = [str(file.relative_to(folder.absolute())) for file in secrets_among(files)]
    if found and not careless:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ConfigError(
            f"nothing is sent: {', '.join(found[:SHOWN])}{more} would be, and look like secrets; name them in"
            " .rayignore, move them away, or say --send-secrets"
        )
    size = sum(file.stat().st_size for file in files)
    print(f"sending {len(files)} files of {folder.resolve()}, {size / 1e6:.1f} MB before they are packed")
    if large := large_among(files):
        names = (f"{f.relative_to(folder.absolute())} ({f.stat().st_size / 1e6:.1f} MB)" for f in large[:SHOWN])
        print(f"large: {', '.join(names)}; name in .rayignore what the job does not need")
