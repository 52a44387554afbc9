"""Write docs/leaderboard.md and .html from the claims in docs/claims; one without evidence is refused in a line.

python jobs/leaderboard.py [FOLDER_OF_CLAIMS [FOLDER_TO_WRITE_INTO]]
"""

import sys

from dircluster.__main__ import run

if __name__ == "__main__":
    sys.exit(run("leaderboard", sys.argv[1:]))
