"""Train a defense and judge it: its target, its own stages, the evaluation.

python jobs/train.py [PRESET] [--config FILE] [--section.field VALUE ...]
"""

import sys

from dircluster.cluster.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
