"""The library part of `experiments.compare`: optimizers against each other."""
