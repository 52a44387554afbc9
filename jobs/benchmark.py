"""Time the phases of a training step (for DIR: craft, restore, perturb, update) on real images, on a CPU or a GPU.

python jobs/benchmark.py [PRESET] [--steps N] [--section.field VALUE ...]
"""

import sys

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("benchmark", sys.argv[1:]))
