"""One call behind jobs/leaderboard.py: the leaderboard from a folder of claims."""

from __future__ import annotations

import sys
from pathlib import Path

from dircluster.config import ConfigError, real_path
from dircluster.printing import say

USAGE = "usage: leaderboard.py [FOLDER_OF_CLAIMS [FOLDER_TO_WRITE_INTO]], which are docs/claims and docs"


def main(argv: list[str]) -> int:
    """Write the pages; -> exit code. A claim that is refused is one line on stderr and code 2."""
    from dircluster.evaluation.leaderboard import write_leaderboard

    if {"-h", "--help"} & {*argv}:
        say(USAGE)
        return 0
    try:
        if len(argv) > 2:
            raise ConfigError(USAGE)
        claims = Path(argv[0]) if argv else Path("docs/claims")
        docs = Path(argv[1]) if len(argv) > 1 else Path("docs")
        if not real_path(docs).is_dir():
            raise ConfigError(f"there is no folder {docs} to write into")
        try:
            for file in write_leaderboard(claims, docs):
                say(f"wrote {file}")
        except OSError as error:
            raise ConfigError(f"the leaderboard cannot be written into {docs}: {error.strerror}") from error
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
