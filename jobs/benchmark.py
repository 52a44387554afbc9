"""Time the phases of a training step (for DIR: craft, restore, perturb, update) on real images, on a CPU or a GPU.

python jobs/benchmark.py [PRESET] [--steps N] [--section.field VALUE ...]
"""

import sys

from dircluster.cluster.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
