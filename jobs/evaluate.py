"""Judge a finished defense again.

python jobs/evaluate.py [PRESET] --defense FOLDER|models:/NAME@champion [--section.field VALUE ...]
"""

import sys

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
