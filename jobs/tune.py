"""Train a defense at every point of a space of one's own, and compare them.

python jobs/tune.py [PRESET] --space FILE [--seeds N] [--search] [--asha] [--section.field VALUE ...]
"""

import sys

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("tune", sys.argv[1:]))
