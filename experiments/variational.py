"""Variational inference by natural gradient: `python -m experiments.variational`.

A conjugate model, on which one step is the exact posterior, and logistic regression on
the breast cancer data of scikit-learn. The library part is
`experiments.tasks.posteriors`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from threadpoolctl import threadpool_limits

from experiments.running.screen import Terminal
from experiments.tasks.posteriors import (
    fit,
    linear_data,
    log_likelihood_linear,
    log_likelihood_logistic,
    logistic_data,
)


def main() -> None:
    """Prints both checks."""
    console = Terminal(highlight=False, markup=False, soft_wrap=True)
    # On a busy machine the threads of LAPACK wait for each other.
    with jax.enable_x64(True), threadpool_limits(limits=1, user_api="blas"):
        x, y = linear_data()
        q, _ = fit(log_likelihood_linear, (x, y), rate=1.0, num_steps=1)
        precision = np.eye(x.shape[1]) + np.asarray(x.T @ x)
        mean = np.linalg.solve(precision, x.T @ y)
        console.print(
            f"linear regression, one step: the posterior mean is off by "
            f"{np.abs(q.mean - mean).max():.1e}, its precision by "
            f"{np.abs(q.precision - precision).max() / np.abs(precision).max():.1e}"
        )
        train, (x, y) = logistic_data()
        q, values = fit(log_likelihood_logistic, train, rate=1.0, num_steps=100)
        spread = jnp.einsum("ni,ij,nj->n", x, jnp.linalg.inv(q.precision), x)
        log_prob = log_likelihood_logistic(x @ q.mean, 0 * spread, y).mean()
        accuracy = (jnp.sign(x @ q.mean) == y).mean()
        flat = ravel_pytree(q)[0]
        console.print(
            f"logistic regression, {x.shape[1]} weights, {flat.size} parameters of q:"
        )
        for count in (0, 1, 2, 3, 5, 10, 20, 30):
            console.print(
                f"  free energy after {count:3d} steps {float(values[count]):.9f}"
            )
        console.print(
            f"  test accuracy {float(accuracy):.1%}, log-probability at the mean "
            f"{float(log_prob):.3f}"
        )


if __name__ == "__main__":
    main()
