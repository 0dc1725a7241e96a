"""A run on disk: its directory, checkpoints, metrics, document losses and environment."""
