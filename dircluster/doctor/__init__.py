"""Whether this machine trains correctly and fast: checks, each a function of the machine that yields findings."""
