"""Send the working directory and a command to a Ray cluster, unless what would be sent holds secrets.

python jobs/submit.py [OPTIONS OF ray job submit] -- python jobs/train.py ...
"""

import sys

from dircluster.cluster.commands.submit import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
