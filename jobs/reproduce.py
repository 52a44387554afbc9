"""Make tables and figures of the DIR paper again: all systems that they compare, trained and judged alike.

python jobs/reproduce.py WHAT [PRESET] [--only SYSTEM,...] [--seeds N] [--budget MINUTES] [--section.field VALUE ...]
"""

import sys

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("reproduce", sys.argv[1:]))
