"""K-FAC: when the Fisher of a linear layer is exactly a Kronecker product.

F = E[x xᵀ ⊗ H] = E[x xᵀ] ⊗ E[H] = A ⊗ G    for an output metric H that does not
                                            depend on the inputs x
"""

import jax
import jax.numpy as jnp
import numpy as np

import ngd_jax as ngd
from experiments.claims.gallery.identity import (
    Identity,
    compiled,
    descend,
    equal,
    text_of,
    unequal,
)

__all__ = ["factored_layer"]


def natural_layer(weights, batch):
    """A linear layer with Gaussian output noise, given its precision matrix."""
    precision = batch["precision"]

    def model_fn(weights, batch):
        return batch["x"] @ weights

    def kl_fn(mean, other):  # ½ (μ - μ')ᵀ G (μ - μ')
        gap = mean - other
        return jnp.sum(gap @ precision * gap, axis=-1) / 2

    def loss_fn(weights, batch):
        return kl_fn(batch["y"], model_fn(weights, batch)).mean()

    tx = ngd.natural_gradient(
        1.0, model_fn, ngd.FromKL(kl_fn), damping=0.0, solver=ngd.Cholesky()
    )
    fisher = ngd.dense_fisher(model_fn, weights, batch, ngd.FromKL(kl_fn))
    return descend(tx, loss_fn, weights, batch)[0][-1], fisher


def factored_step(weights, x, y, precision):
    """W ← W - A⁻¹ (∂loss/∂W) G⁻¹, and the Fisher A ⊗ G."""
    A, G = x.T @ x / len(x), precision
    gradient = x.T @ (x @ weights - y) @ precision / len(x)
    step = np.linalg.solve(A, gradient) @ np.linalg.inv(G)
    return weights - step, np.kron(A, G)


def factored_layer(quick: bool) -> Identity:
    """On random inputs and targets: the matrix, the step, and softmax outputs.

    Condition: One linear layer, and an output metric that does not depend on the
    inputs: Gaussian outputs with any covariance; softmax only if all examples have the
    same probabilities, as with zero weights. For deeper networks, A ⊗ G without terms
    between layers is an approximation.

    Source: Martens and Grosse 2015, section 3

    Measured on: {num_examples} random examples, {inputs} inputs, {outputs} outputs with
    correlated noise
    """
    num_examples, inputs, outputs = (50, 4, 3) if quick else (500, 20, 5)
    random = np.random.default_rng(0)
    x = np.c_[random.normal(size=(num_examples, inputs - 1)), np.ones(num_examples)]
    y = random.normal(size=(num_examples, outputs))
    root = np.eye(outputs) + 0.3 * random.normal(size=(outputs, outputs))
    precision = root @ root.T
    weights = random.normal(size=(inputs, outputs))

    batch = {"x": x, "y": y, "precision": precision}
    arrays = jax.tree.map(jnp.asarray, batch)
    found, fisher = compiled(natural_layer)(jnp.asarray(weights), arrays)
    truth, factored = factored_step(weights, **batch)

    def softmax_fisher(scale: jax.Array) -> jax.Array:
        return ngd.dense_fisher(
            lambda w, x: x @ w, scale * weights, jnp.asarray(x), ngd.Categorical()
        )

    run = compiled(softmax_fisher)
    alike, varied = run(0.0), run(1.0)
    size = {
        "num_rounded": num_examples + weights.size,
        "condition": float(np.linalg.cond(factored)),
    }
    name = "K-FAC, F and step"
    return Identity(
        algorithm="K-FAC, one layer",
        ours=natural_layer,
        textbook=factored_step,
        equality=equal(name, (found, fisher), (truth, factored), **size),
        limit=unequal(
            "K-FAC, softmax outputs, F and A ⊗ G: difference",
            _factors(x, weights),
            varied,
            "the output metric depends on the inputs",
        ),
        others=[
            equal(
                "K-FAC, softmax at zero weights, F and A ⊗ G",
                alike,
                _factors(x, 0 * weights),
                num_rounded=num_examples,
            )
        ],
        text=text_of(
            factored_layer, num_examples=num_examples, inputs=inputs, outputs=outputs
        ),
    )


def _factors(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A ⊗ G for softmax outputs, with G the mean of diag(p) - p pᵀ."""
    exponentials = np.exp(x @ weights)
    p = exponentials / exponentials.sum(axis=1, keepdims=True)
    metric = np.diag(p.mean(axis=0)) - p.T @ p / len(p)
    return np.kron(x.T @ x / len(x), metric)
