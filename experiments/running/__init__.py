"""What every run has: configuration, loop, checkpoints, logs, screen, processes."""
