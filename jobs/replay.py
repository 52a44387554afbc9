"""Compute a row of a report or a claim again, from its commit, settings and seed: the same images, the same accuracy?

python jobs/replay.py REPORT.json ROW [--data URI] [--defense URI] [--trust-code]
"""

import sys

from dircluster.cluster.commands.replay import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
