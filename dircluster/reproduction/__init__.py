"""The tables and figures of the DIR paper: what they need, what that costs, and what came out beside the paper's."""
