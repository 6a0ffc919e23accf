"""The library part of `experiments.compare`: a race between optimizers."""
