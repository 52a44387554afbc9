"""Train a DIR defense and judge it: target, pre-training, DIR, evaluation.

python jobs/train.py [PRESET] [--config FILE] [--section.field VALUE ...]
"""

import sys

from dircluster.cluster.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
