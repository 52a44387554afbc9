"""Train a defense at every point of a space of one's own, and compare them.

python jobs/tune.py [PRESET] --space FILE [--seeds N] [--search] [--asha] [--section.field VALUE ...]
"""

import sys

from dircluster.cluster.commands.tune import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
