"""Training: optimizer and schedule, metrics, and the loop."""
