"""Tell whether this machine trains correctly and fast: in three minutes on a GPU, in one on a CPU.

python jobs/doctor.py [PRESET] [--summary FILE.json] [--section.field VALUE ...]
"""

import sys

from dircluster.cluster.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
