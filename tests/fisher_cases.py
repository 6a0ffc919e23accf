"""Every likelihood behind a small network, each with its reference metric and KL."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ngd_jax as ngd
from tests import reference


class Case(NamedTuple):
    """A likelihood, a model for it, and the truth from `tests.reference`.

    `true_fisher(outputs, jacobian, weights)` and `true_kl(p, q, weights)` take NumPy
    arrays; `weights` broadcast against the shape of the examples.
    """

    likelihood: ngd.Likelihood
    num_outputs: int
    head: Callable[[jax.Array], Any]
    true_fisher: Callable[..., np.ndarray]
    true_kl: Callable[..., float]
    batch_shape: tuple[int, ...] = (7,)
    complex_params: bool = False

    def model_fn(self, params, x):
        return self.head(reference.network(params, x))

    def make(self, rng, dtype="float32"):
        """Parameters and batch."""
        kind = np.result_type(dtype, np.complex64) if self.complex_params else dtype
        params = reference.network_params(rng, self.num_outputs, dtype=kind)
        x = jnp.asarray(rng.normal(size=(*self.batch_shape, 2)), kind)
        return params, x


def separable(metric_fn, kl_fn):
    """Fisher and KL of a likelihood whose outputs are one array, [..., D]."""

    def true_fisher(outputs, jacobian, weights=None):
        measure = reference.normalised(weights, outputs.shape[:-1])
        return reference.fisher_of(metric_fn(outputs), jacobian, measure)

    def true_kl(p, q, weights=None):
        measure = reference.normalised(weights, p.shape[:-1])
        return np.sum(measure * kl_fn(p, q))

    return true_fisher, true_kl


def diagonal_gaussian_fisher(outputs, jacobian, weights=None):
    measure = reference.normalised(weights, outputs["mean"].shape[:-1])
    metric = reference.diagonal_gaussian_metric(outputs["mean"], outputs["log_scale"])
    rows = np.concatenate([jacobian["mean"], jacobian["log_scale"]], axis=-2)
    return reference.fisher_of(metric, rows, measure)


def diagonal_gaussian_kl(p, q, weights=None):
    measure = reference.normalised(weights, p["mean"].shape[:-1])
    kl = reference.diagonal_gaussian_kl(
        p["mean"], p["log_scale"], q["mean"], q["log_scale"]
    )
    return np.sum(measure * kl)


CATEGORICAL = separable(reference.categorical_metric, reference.categorical_kl)
BERNOULLI = separable(reference.bernoulli_metric, reference.bernoulli_kl)
POISSON = separable(reference.poisson_metric, reference.poisson_kl)
GAUSSIAN = separable(
    lambda m: reference.gaussian_metric(m, 0.7),
    lambda p, q: reference.gaussian_kl(p, q, 0.7),
)


def per_scalar(pair):
    """For outputs without an event axis."""
    fisher, kl = pair
    return (
        lambda o, j, w=None: fisher(o[..., None], j[..., None, :], w),
        lambda p, q, w=None: kl(p[..., None], q[..., None], w),
    )


def per_image(pair):
    """For outputs with two event axes."""
    fisher, kl = pair

    def rows(x):
        return x.reshape(*x.shape[:-2], -1)

    return (
        lambda o, j, w=None: fisher(
            rows(o), j.reshape(*j.shape[:-3], -1, j.shape[-1]), w
        ),
        lambda p, q, w=None: kl(rows(p), rows(q), w),
    )


# A Product whose blocks have batches of different sizes, and weights.
HEADS = ngd.Product(
    {"box": ngd.DiagonalGaussian(), "label": ngd.Categorical()},
    weights={"box": 0.25, "label": 2.0},
)


def heads(z):
    box = z[:3]
    return {
        "label": z[..., :3],
        "box": {"mean": box[..., 3:4], "log_scale": box[..., 4:5]},
    }


def heads_fisher(outputs, jacobian, weights=None):
    weights = weights or {"box": None, "label": None}
    box = diagonal_gaussian_fisher(outputs["box"], jacobian["box"], weights["box"])
    label = CATEGORICAL[0](outputs["label"], jacobian["label"], weights["label"])
    return 0.25 * box + 2.0 * label


def heads_kl(p, q, weights=None):
    weights = weights or {"box": None, "label": None}
    return 0.25 * diagonal_gaussian_kl(
        p["box"], q["box"], weights["box"]
    ) + 2.0 * CATEGORICAL[1](p["label"], q["label"], weights["label"])


def covariance_fisher(outputs, jacobian, weights=None):
    measure = reference.normalised(weights, outputs.shape)
    return reference.covariance_of(jacobian, measure)


def real_covariance_fisher(outputs, jacobian, weights=None):
    return covariance_fisher(outputs, jacobian, weights).real


def density_kl(p, q, weights=None):
    return reference.density_kl(p, q, reference.normalised(weights, p.shape))


def amplitude_kl(p, q, weights=None):
    return density_kl(2 * p.real, 2 * q.real, weights)


def exponential_kl(log_rate_p, log_rate_q):
    d = log_rate_q - log_rate_p
    return jnp.sum(jnp.expm1(d) - d, axis=-1)


EXPONENTIAL = separable(
    lambda z: np.broadcast_to(np.eye(z.shape[-1]), (*z.shape, z.shape[-1])),
    lambda p, q: np.sum(np.exp(q - p) - 1 - (q - p), axis=-1),
)


def identity(z):
    return z


def first(z):
    return z[..., 0]


CASES = {
    "categorical": Case(ngd.Categorical(), 3, identity, *CATEGORICAL),
    "categorical over tokens": Case(
        ngd.Categorical(), 3, identity, *CATEGORICAL, batch_shape=(4, 3)
    ),
    "bernoulli": Case(ngd.Bernoulli(), 3, identity, *BERNOULLI),
    "bernoulli image": Case(
        ngd.Bernoulli(event_ndims=2),
        4,
        lambda z: z.reshape(*z.shape[:-1], 2, 2),
        *per_image(BERNOULLI),
    ),
    "gaussian": Case(ngd.Gaussian(scale=0.7), 2, identity, *GAUSSIAN),
    "gaussian scalar": Case(
        ngd.Gaussian(scale=0.7, event_ndims=0), 1, first, *per_scalar(GAUSSIAN)
    ),
    "diagonal gaussian": Case(
        ngd.DiagonalGaussian(),
        4,
        lambda z: {"mean": z[..., :2], "log_scale": z[..., 2:]},
        diagonal_gaussian_fisher,
        diagonal_gaussian_kl,
    ),
    "poisson": Case(ngd.Poisson(), 2, identity, *POISSON),
    "product": Case(HEADS, 5, heads, heads_fisher, heads_kl),
    "log density": Case(ngd.LogDensity(), 1, first, real_covariance_fisher, density_kl),
    "log amplitude": Case(
        ngd.LogAmplitude(), 1, first, real_covariance_fisher, amplitude_kl
    ),
    "complex amplitude": Case(
        ngd.LogAmplitude(),
        2,
        lambda z: jax.lax.complex(z[..., 0], z[..., 1]),
        real_covariance_fisher,
        amplitude_kl,
    ),
    "holomorphic amplitude": Case(
        ngd.LogAmplitude(),
        1,
        first,
        covariance_fisher,
        amplitude_kl,
        complex_params=True,
    ),
    "from kl": Case(ngd.FromKL(exponential_kl), 2, identity, *EXPONENTIAL),
}


def matvec(model_fn, params, batch, likelihood, vector, **options):
    """`ngd.fisher_vector_product`, compiled: an eager one compiles every operation."""

    @jax.jit
    def product(params, vector):
        return ngd.fisher_vector_product(
            model_fn, params, batch, likelihood, vector, **options
        )

    return product(params, vector)


# --- Comparisons and draws that several test files share.


def assert_close(actual, truth, tolerance):
    """Relative to the largest entry."""
    actual, truth = np.asarray(actual), np.asarray(truth)
    assert actual.shape == truth.shape
    size = np.abs(truth).max(initial=0)
    np.testing.assert_allclose(actual, truth, rtol=0, atol=tolerance * size)


def random_like(params, rng):
    def draw(x):
        values = rng.normal(size=x.shape)
        if jnp.iscomplexobj(x):
            values = values + 1j * rng.normal(size=x.shape)
        return jnp.asarray(values, x.dtype)

    return jax.tree.map(draw, params)
