"""What all runs share: configuration, loop, checkpoints, logs, screen, processes."""
