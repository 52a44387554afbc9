"""``dircluster VERB ...``: the jobs as one command, for whoever has installed the package without its jobs folder."""

from __future__ import annotations

import importlib
import io
import signal
import sys
from typing import Any

from dircluster.printing import say

VERBS = {
    "train": "train a defense and evaluate it",
    "evaluate": "evaluate a defense, whoever trained it",
    "tune": "train a defense at every point of a space",
    "reproduce": "make tables and figures of the DIR paper again",
    "benchmark": "time the phases of a training step",
    "doctor": "tell whether this machine trains correctly and fast",
}


def main(argv: list[str] | None = None) -> int:
    """Run the verb that the first word names; -> its exit code, 2 for a word that is none."""
    words = sys.argv[1:] if argv is None else argv
    usage = "\n".join(["usage: dircluster VERB ...", *(f"  {verb:10} {text}" for verb, text in VERBS.items())])
    if not words or words[0] in ("-h", "--help"):
        say(f"{usage}\ndircluster VERB --help tells more.")
        return 0
    if words[0] not in VERBS:
        print(f"error: there is no verb {words[0]!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return run(words[0], words[1:])


def run(job: str, *words: Any) -> int:
    """The command ``job`` with ``words``; -> its exit code, that of Ctrl-C where it comes before the job listens.

    What the encoding of standard output has no characters for is shown as ``\\xfc`` there.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code: int = importlib.import_module(f"dircluster.cluster.commands.{job}").main(*words)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code


if __name__ == "__main__":
    sys.exit(main())
