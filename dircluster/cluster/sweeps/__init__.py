"""Ray Tune: sweeps over settings."""
