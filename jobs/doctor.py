"""Tell whether this machine trains correctly and fast: in three minutes on a GPU, in one on a CPU.

python jobs/doctor.py [PRESET] [--summary FILE.json] [--section.field VALUE ...]
"""

import sys

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("doctor", sys.argv[1:]))
