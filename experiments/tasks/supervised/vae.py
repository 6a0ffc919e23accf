"""A variational autoencoder of images: two distributions, one metric.

    q(z | x) = N(mean, exp(log_scale)²),    z = mean + exp(log_scale) ε,    p(x | z)

The outputs are the parameters of both distributions, and the likelihood is their
`Product`: a radius on the pixels alone would leave the code free to move wherever the
decoder does not look. The loss is the negative ELBO in nats per image, for one draw of
ε. Each step draws its own; evaluation uses the ones stored with the images, so that it
is deterministic.
"""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import ngd_jax as ngd
from experiments.running.settings import AT_LEAST_ONE
from experiments.tasks.supervised.images import load_images, to_unit_interval
from experiments.tasks.supervised.task import PyTree, Task

__all__ = ["VAE", "make_vae"]


class VAE(nn.Module):
    """Encoder and decoder with one hidden tanh layer each.

    Attributes:
      hidden: width of both hidden layers.
      code: dimensions of the code.
    """

    hidden: int
    code: int

    @nn.compact
    def __call__(self, x: jax.Array, noise: jax.Array) -> PyTree:
        """Parameters of q and p for images `[..., D]` and ε, `[..., code]`."""
        encoded = jnp.tanh(nn.Dense(self.hidden)(x))
        mean, log_scale = jnp.split(nn.Dense(2 * self.code)(encoded), 2, axis=-1)
        decoded = nn.Dense(self.hidden)(mean + jnp.exp(log_scale) * noise)
        return {
            "code": {"mean": mean, "log_scale": log_scale},
            "pixels": nn.Dense(x.shape[-1])(jnp.tanh(decoded)),
        }


def make_vae(
    hidden: Annotated[int, AT_LEAST_ONE],
    code: Annotated[int, AT_LEAST_ONE],
    data_dir: str | None,
    cache_dir: str | None,
) -> Task:
    """Builds the task on Fashion-MNIST from its settings.

    Args:
      hidden: width of the hidden layers of encoder and decoder.
      code: dimensions of the code.
      data_dir: a folder to search for the data first; null for none.
      cache_dir: a folder for a memory-mapped copy of the pixels; null keeps them in
        memory.
    """
    rng = np.random.default_rng(0)
    train, test = (
        {"x": part["x"], "noise": rng.standard_normal((len(part["x"]), code), "f4")}
        for part in load_images("fashion_mnist", data_dir, cache_dir)
    )
    network = VAE(hidden, code)
    likelihood = ngd.Product(
        {"code": ngd.DiagonalGaussian(), "pixels": ngd.Bernoulli()}
    )

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        x, noise = jnp.zeros((1, train["x"].shape[1])), jnp.zeros((1, code))
        return network.init(key, x, noise)["params"], {}

    def model_fn(params: PyTree, batch: PyTree) -> PyTree:
        x = to_unit_interval(batch["x"])
        return network.apply({"params": params}, x, batch["noise"])

    def draw_fn(key: jax.Array, batch: PyTree) -> PyTree:
        return {**batch, "noise": jax.random.normal(key, batch["noise"].shape)}

    def terms(outputs: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
        x, prior = to_unit_interval(batch["x"]), jax.tree.map(jnp.zeros_like, outputs)
        reconstruction = -ngd.Bernoulli().log_prob(outputs["pixels"], x)
        rate = ngd.DiagonalGaussian().kl(outputs["code"], prior["code"])
        return jnp.mean(reconstruction), jnp.mean(rate)

    def metrics_fn(outputs: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        reconstruction, rate = terms(outputs, batch)
        return {"reconstruction": reconstruction, "code_kl": rate}

    return Task(
        name="vae",
        train=train,
        test=test,
        init_fn=init_fn,
        model_fn=model_fn,
        likelihood=likelihood,
        output_loss_fn=lambda outputs, batch: sum(terms(outputs, batch)),  # pyright: ignore[reportArgumentType]
        metrics_fn=metrics_fn,
        draw_fn=draw_fn,
    )
