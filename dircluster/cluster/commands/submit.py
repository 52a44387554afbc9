"""One call behind jobs/submit.py: look at what would be sent, pack it, and let Ray send it."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dircluster import cli
from dircluster.cluster.working_dir import large_among, pack, secrets_among
from dircluster.config import ConfigError, first_line
from dircluster.printing import say

USAGE = """usage: python jobs/submit.py [--send-secrets] [OPTIONS OF ray job submit] -- python jobs/train.py ...

Submit the working directory and a command to a Ray cluster, as ray job submit --working-dir . does, unless a file among
those that would be sent looks like a secret. What .rayignore and .gitignore name is not sent; the rest is packed."""
SHOWN = 5
"""Files that the line names."""


def main(argv: Sequence[str]) -> int:
    """Submit what ``argv`` says; -> exit code, Ray's where it was asked. Errors are one line on stderr."""
    if not argv or argv[0] in ("-h", "--help"):
        say(USAGE)
        return 0
    with tempfile.TemporaryDirectory(prefix="dircluster-submit-") as place:
        try:
            words = checked(argv, Path(place) / "working-dir.zip")
            return _run([str(Path(sys.executable).with_name("ray")), "job", "submit", *words])
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


def checked(argv: Sequence[str], package: Path) -> list[str]:
    """The words that follow ``ray job submit``, the working directory packed as ``package``.

    Ray packs it itself, without compression, where ``--runtime-env`` may leave files out of it. Raises ConfigError
    where a file that looks like a secret would go, or one cannot be read or packed.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    options, command = list(argv[:cut]), list(argv[cut:])
    if len(command) < 2:
        raise ConfigError("the command is missing: end with -- python jobs/train.py ...")
    careless = "--send-secrets" in options
    options = [word for word in options if word != "--send-secrets"]
    folder = cli.value_of("--working-dir", options) or "."
    if "://" not in folder and not folder.endswith(".zip"):
        packs = not any(word.startswith("--runtime-env") for word in options)
        try:
            files = _looked_at(Path(folder), careless)
            if packs:
                pack(files, Path(folder).absolute(), package)
        except (OSError, UnicodeError) as error:  # such as a file without permission, a name of bytes, a full disk
            raise ConfigError(f"--working-dir {folder} cannot be packed: {first_line(error)}") from error
        if packs:
            say(f"packed: {package.stat().st_size / 1e6:.1f} MB")
            folder = str(package)
    return [*options, "--working-dir", folder, *command]  # the last one counts


def _looked_at(folder: Path, careless: bool) -> list[Path]:
    from dircluster.cluster.runtime.upload import files_sent

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
    say(f"sending {len(files)} files of {folder.resolve()}, {size / 1e6:.1f} MB before they are packed")
    if large := large_among(files):
        names = (f"{f.relative_to(folder.absolute())} ({f.stat().st_size / 1e6:.1f} MB)" for f in large[:SHOWN])
        say(f"large: {', '.join(names)}; name in .rayignore what the job does not need")
    return files


def _run(command: list[str]) -> int:
    """-> the exit code of ``command``. Ctrl-C reaches it from the terminal; other ends are passed on to it.

    What this process ignores, as under nohup, the command ignores too; signals that come are sent on to it.
    Raises ConfigError where there is no such command.
    """
    started: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for process in started:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # before it starts: an end may come meanwhile
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, pass_on if number != signal.SIGINT else lambda *_: None)
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be started: {error.strerror}") from error
    started.append(process)
    for early in tuple(received):
        process.send_signal(early)
    code = process.wait()
    return code if code >= 0 else 128 - code
