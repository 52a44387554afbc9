"""Judge a finished defense again.

python jobs/evaluate.py [PRESET] --defense FOLDER|models:/NAME@champion [--section.field VALUE ...]
"""

import sys

from dircluster.cluster.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
