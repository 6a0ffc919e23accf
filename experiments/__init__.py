"""Programs built on ngd_jax: train, compare, benchmark, claims and variational."""
