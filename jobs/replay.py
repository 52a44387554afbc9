"""Compute a row of a report or a claim again, from its commit, settings and seed: the same images, the same accuracy?

python jobs/replay.py REPORT.json ROW [--data URI] [--defense URI] [--trust-code]
"""

import sys

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("replay", sys.argv[1:]))
