"""Train a defense and judge it: its target, its own stages, the evaluation.

python jobs/train.py [PRESET] [--config FILE] [--section.field VALUE ...]
"""

import sys

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:]))
