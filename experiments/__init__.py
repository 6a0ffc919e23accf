"""Programs built on ngd_jax: train, and benchmark."""
