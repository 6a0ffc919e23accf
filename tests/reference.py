"""The truth that the tests compare with: dense, float64, written plainly.

    F = Σₙ μₙ Jₙᵀ Hₙ Jₙ,    Hₙ = Σ_y p(y) s_y s_yᵀ,    s_y = ∂ log p(y) / ∂ outputs

J is the full Jacobian in 64-bit mode, H is enumerated in NumPy over the targets. None
of the library's own code is used here, and nothing here is fast.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

COUNTS = np.arange(120)  # enough for rates below 40


# --- Models: pure functions of parameters and batch, as a user would write them.


def network_params(rng, num_outputs, *, num_inputs=2, num_hidden=3, dtype="float32"):
    """A two-layer network in a nested tree, with an empty subtree and a scalar."""

    def draw(*shape):
        values = rng.normal(size=shape)
        if np.issubdtype(dtype, np.complexfloating):
            values = values + 1j * rng.normal(size=shape)
        return jnp.asarray(values, dtype)

    return {
        "hidden": {"w": draw(num_inputs, num_hidden), "b": draw(num_hidden)},
        "nothing": {},
        "out": [draw(num_hidden, num_outputs), draw(num_outputs)],
        "scale": jnp.asarray(0.8, dtype),
    }


def network(params, x):
    """X [..., inputs] -> [..., outputs]."""
    weights, bias = params["hidden"]["w"], params["hidden"]["b"]
    hidden = jnp.tanh(x @ weights + _row(bias, x.ndim))
    weights, bias = params["out"]
    return params["scale"] * (hidden @ weights + _row(bias, x.ndim))


def batch_norm_network(params, x):
    """A network whose examples see each other through the batch statistics."""
    weights, bias = params["hidden"]["w"], params["hidden"]["b"]
    hidden = x @ weights + _row(bias, x.ndim)
    mean = hidden.mean(0, keepdims=True)
    variance = ((hidden - mean) ** 2).mean(0, keepdims=True)
    hidden = jnp.tanh((hidden - mean) / jnp.sqrt(variance + 1e-3))
    weights, bias = params["out"]
    return params["scale"] * (hidden @ weights + _row(bias, x.ndim))


def _row(vector, ndim):
    return vector.reshape((1,) * (ndim - 1) + (-1,))


# --- The Jacobian.


def jacobian(model_fn, params, batch):
    """Outputs and Jacobian, leaf by leaf, in float64: [..., P] after the output axes.

    In the order of `ravel_pytree`. For complex parameters the holomorphic one.
    """
    with jax.enable_x64(True):
        params, batch = jax.tree.map(_to_wide, (params, batch))
        return jax.tree.map(np.asarray, _jacobian(model_fn)(params, batch))


@functools.cache
def _jacobian(model_fn):
    def parts_fn(flat, unravel, batch):
        outputs = model_fn(unravel(flat), batch)
        return jax.tree.map(lambda x: (jnp.real(x), jnp.imag(x)), outputs)

    @jax.jit
    def both(params, batch):
        flat, unravel = ravel_pytree(params)
        outputs = model_fn(params, batch)
        if jnp.iscomplexobj(flat):
            return outputs, jax.jacfwd(
                lambda flat: model_fn(unravel(flat), batch), holomorphic=True
            )(flat)
        # Complex outputs of real parameters: both parts are real functions.
        parts = jax.jacfwd(parts_fn)(flat, unravel, batch)

        def join(output, part):
            is_complex = jnp.iscomplexobj(output)
            return jax.lax.complex(*part) if is_complex else part[0]

        return outputs, jax.tree.map(join, outputs, parts)

    return both


def _to_wide(x):
    if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    wide = complex if jnp.iscomplexobj(x) else float
    if isinstance(x, jax.Array) and x.dtype == jnp.bfloat16:
        x = x.astype(jnp.float32)
    return jnp.asarray(np.asarray(x), wide)


# --- Output metrics H, [examples, D, D], enumerated over the targets.


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def categorical_metric(logits):
    """Σ_y p(y) (e_y - p)(e_y - p)ᵀ."""
    p = softmax(logits)
    scores = np.eye(logits.shape[-1]) - p[..., None, :]  # [..., y, K]
    return np.einsum("...y,...yi,...yj->...ij", p, scores, scores)


def bernoulli_metric(logits):
    """Over all 2ᴰ targets, so that independence is found, not assumed."""
    p = 1 / (1 + np.exp(-logits))
    total = 0
    for bits in itertools.product([0.0, 1.0], repeat=logits.shape[-1]):
        y = np.array(bits)
        mass = np.prod(np.where(y == 1, p, 1 - p), axis=-1)
        score = y - p
        total = total + np.einsum("...,...i,...j->...ij", mass, score, score)
    return total


def gaussian_metric(means, scale=1.0):
    """Gauss-Hermite quadrature of the score (y - m)/σ² in each coordinate."""
    points, masses = _normal_rule()
    variance = np.sum(masses * points**2) / scale**2
    return np.broadcast_to(
        variance * np.eye(means.shape[-1]), (*means.shape, means.shape[-1])
    )


def diagonal_gaussian_metric(mean, log_scale):
    """In the order [mean, log_scale]; scores ε/σ and ε² - 1, by quadrature."""
    points, masses = _normal_rule()
    num = mean.shape[-1]
    metric = np.zeros((*mean.shape[:-1], 2 * num, 2 * num))
    scale = np.exp(log_scale)
    for i in range(num):
        for point, mass in zip(points, masses, strict=True):
            score = np.zeros((*mean.shape[:-1], 2 * num))
            score[..., i] = point / scale[..., i]
            score[..., num + i] = point**2 - 1
            metric += mass * score[..., :, None] * score[..., None, :]
    return metric


def poisson_metric(log_rates):
    """Σ_k p(k) (k - λ)² in each coordinate."""
    rates = np.exp(log_rates)
    variance = np.sum(
        poisson_masses(log_rates) * (COUNTS - rates[..., None]) ** 2, axis=-1
    )
    return variance[..., None] * np.eye(log_rates.shape[-1])


def poisson_masses(log_rates):
    log_factorial = np.array([math.lgamma(k + 1) for k in COUNTS])
    log_mass = COUNTS * log_rates[..., None] - np.exp(log_rates)[..., None]
    return np.exp(log_mass - log_factorial)


def _normal_rule():
    points, masses = np.polynomial.hermite_e.hermegauss(20)
    return points, masses / masses.sum()


# --- KL divergences, one value per example.


def categorical_kl(p_logits, q_logits):
    p, log_p, log_q = softmax(p_logits), log_softmax(p_logits), log_softmax(q_logits)
    return np.sum(np.where(p > 0, p * (log_p - log_q), 0), axis=-1)


def bernoulli_kl(p_logits, q_logits):
    pairs = [np.stack([np.zeros_like(x), x], -1) for x in (p_logits, q_logits)]
    return categorical_kl(*pairs).sum(-1)


def gaussian_kl(p, q, scale=1.0):
    return diagonal_gaussian_kl(
        p, np.full_like(p, np.log(scale)), q, np.full_like(q, np.log(scale))
    )


def diagonal_gaussian_kl(p_mean, p_log_scale, q_mean, q_log_scale):
    """E_p[log p - log q] by quadrature."""
    points, masses = _normal_rule()

    def log_density(mean, log_scale):
        # Differences first: scales of 1e30 and 0 overflow only where means differ.
        moved = p_mean - mean
        scale = np.exp(np.where(moved == 0, 0.0, log_scale))
        shift = moved / scale
        z = shift[..., None] + np.exp(p_log_scale - log_scale)[..., None] * points
        return -(z**2) / 2 - log_scale[..., None]

    log_ratio = log_density(p_mean, p_log_scale) - log_density(q_mean, q_log_scale)
    return np.sum(masses * log_ratio, axis=(-2, -1))


def poisson_kl(p_log_rates, q_log_rates):
    p = poisson_masses(p_log_rates)
    difference = (p_log_rates - q_log_rates)[..., None]
    rates = (np.exp(q_log_rates) - np.exp(p_log_rates))[..., None]
    return np.sum(p * (COUNTS * difference + rates), axis=(-2, -1))


def density_kl(p_log, q_log, measure):
    """KL of the two densities restricted to weighted samples of the first."""
    log_ratio = np.where(measure > 0, q_log - p_log, -np.inf)
    q_mass = measure * np.exp(log_ratio - log_ratio.max())
    q_mass /= q_mass.sum()
    positive = measure > 0
    return np.sum(measure[positive] * np.log(measure[positive] / q_mass[positive]))


# --- F itself.


def normalised(weights, shape):
    """μ = w / Σ w, of the shape of the examples."""
    weights = np.broadcast_to(np.ones(()) if weights is None else weights, shape)
    return weights / weights.sum()


def fisher_of(metric, rows, measure):
    """Σ μ Jᵀ H J; `rows` [..., D, P], `metric` [..., D, D], `measure` [...]."""
    rows = rows.reshape(-1, *rows.shape[-2:])
    metric = metric.reshape(-1, *metric.shape[-2:])
    return np.einsum("n,nip,nij,njq->pq", measure.ravel(), rows, metric, rows)


def covariance_of(rows, measure):
    """Σ μ (J - J̄)ᴴ (J - J̄) with the weighted mean; `rows` [..., P]."""
    rows = rows.reshape(-1, rows.shape[-1])
    measure = measure.reshape(-1)
    centred = rows - np.sum(measure[:, None] * rows, axis=0)
    return np.einsum("n,np,nq->pq", measure, centred.conj(), centred)


def outer_products_of(scores, measure):
    """Σ μ g gᵀ of per-example gradients; `scores` [N, P]."""
    return np.einsum("n,np,nq->pq", measure, scores, scores)


def flat(tree):
    """All leaves in one float64 vector, in the order of `ravel_pytree`."""
    leaves = [np.asarray(jnp.asarray(x)) for x in jax.tree.leaves(tree)]
    wide = [x.astype(complex if np.iscomplexobj(x) else float) for x in leaves]
    return np.concatenate([x.ravel() for x in wide]) if wide else np.zeros(0)


def unflat(vector, like):
    """The inverse of `flat`, in the dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([np.size(x) for x in leaves])
    parts = np.split(np.asarray(vector), ends[:-1])
    return jax.tree.unflatten(
        structure,
        [
            jnp.asarray(part.reshape(np.shape(x)), jnp.result_type(x))
            for part, x in zip(parts, leaves, strict=True)
        ],
    )
