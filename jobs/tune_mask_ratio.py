"""Train a defense at every point of the mask ratio (Section 4.3), and compare them.

python jobs/tune_mask_ratio.py [PRESET] [--seeds N] [--search] [--asha] [--section.field VALUE ...]
"""

import sys
from pathlib import Path

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("tune", sys.argv[1:], Path(__file__).parents[1] / "tune_spaces" / "mask_ratio.py"))
