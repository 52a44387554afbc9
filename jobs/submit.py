"""Send the working directory and a command to a Ray cluster, unless what would be sent holds secrets.

python jobs/submit.py [OPTIONS OF ray job submit] -- python jobs/train.py ...
"""

import sys

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("submit", sys.argv[1:]))
