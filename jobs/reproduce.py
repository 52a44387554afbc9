"""Make tables and figures of the DIR paper again: all systems that they compare, trained and judged alike.

python jobs/reproduce.py WHAT [PRESET] [--only SYSTEM,...] [--seeds N] [--budget MINUTES] [--section.field VALUE ...]
"""

import sys

from dircluster.cluster.commands.reproduce import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
