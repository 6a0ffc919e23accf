"""Equal parameters are at KL 0, and KL grows as outputs differ.

Claimed: The KL between two networks with the same parameters is 0, and the further
apart their outputs are, the larger the KL; the Fisher matrix is its curvature.

Verdict: Exactly true. The converse is false: different parameters may give the same
outputs, and thus KL 0.

Source: Amari 1998, Natural gradient works efficiently in learning

Note: The converse is false: KL 0 does not imply equal parameters. Permuting the hidden
units changes only the parameters, not the function, so the KL measures how far the
model moves, not how far the parameters move.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Check, Evidence, check, theory
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.networks import Layers, digits, mlp_params, model_fn
from experiments.claims.texts import claim_of, described, drawn, notes
from ngd_jax import dense

__all__ = ["DIVERGENCE"]

_LIKELIHOOD = ngd.Categorical()
_DISTANCES = 10.0 ** np.arange(-5, 1)
_PARTS = np.linspace(0.0, 1.0, 101)


class _Measured(NamedTuple):
    """Everything that is computed on the device, in one compilation.

    Attributes:
      value: KL(θ, θ).
      gradient: of KL(θ, ·) at θ.
      hessian: likewise.
      dense: F.
      along: KL to points along a direction.
      curvature: dᵀFd for that direction d.
      in_outputs: KL along a straight line to another network's logits.
      moved: distance in the parameters to a network with permuted units.
      same: KL to that network.
    """

    value: jax.Array
    gradient: jax.Array
    hessian: jax.Array
    dense: jax.Array
    along: jax.Array
    curvature: jax.Array
    in_outputs: jax.Array
    moved: jax.Array
    same: jax.Array


@functools.partial(jax.jit, static_argnames="likelihood")
def _measure(
    key: jax.Array, batch: dict[str, jax.Array], likelihood: ngd.Likelihood
) -> _Measured:
    params = mlp_params(key, [64, 10, 10])
    flat, unravel = ravel_pytree(params)
    fisher = ngd.linearize_fisher(model_fn, params, batch, likelihood)

    def kl(vector: jax.Array) -> jax.Array:
        return fisher.kl(unravel(vector))

    # 1. At equality: the value, the gradient, the Hessian.
    value, gradient = jax.value_and_grad(kl)(flat)
    hessian = jax.jacfwd(jax.grad(kl))(flat)

    # 2. Away from it, along one direction.
    direction = jax.random.normal(jax.random.fold_in(key, 1), flat.shape)
    direction /= jnp.linalg.norm(direction)
    along = jax.vmap(lambda distance: kl(flat + distance * direction))(_DISTANCES)

    # 3. In the outputs: along a line from one network's logits to another's.
    logits = fisher.outputs
    way = model_fn(unravel(flat + direction), batch) - logits
    in_outputs = jax.vmap(
        lambda part: likelihood.kl(logits, logits + part * way).mean()
    )(_PARTS)

    # 4. Other parameters, the same outputs.
    permuted = _permute(params)
    return _Measured(
        value,
        gradient,
        hessian,
        dense.dense(fisher),
        along,
        fisher.quadratic(unravel(direction)),
        in_outputs,
        moved=jnp.linalg.norm(ravel_pytree(permuted)[0] - flat),
        same=ngd.mean_kl(model_fn, params, permuted, batch, likelihood),
    )


def demonstrate(quick: bool) -> Evidence:
    """64-10-10 on the digits: KL, its derivatives, and how it grows.

    Handwritten digits, {count} examples, a 64-10-10 tanh network with softmax outputs
    and random weights, float64.
    """
    batch = digits(100 if quick else 500)
    found = jax.tree.map(np.asarray, _measure(jax.random.key(0), batch, _LIKELIHOOD))
    value, moved, same = float(found.value), float(found.moved), float(found.same)
    disagreement = float(
        np.linalg.norm(found.hessian - found.dense) / np.linalg.norm(found.dense)
    )
    measured, guess = found.along, _DISTANCES**2 * found.curvature / 2
    errors = np.abs(guess / measured - 1)
    # From 1e-3 to 1e-1: round-off dominates below, and the theory fails above.
    decades = errors[3:5] / errors[2:4]
    smallest_rise = float(np.diff(found.in_outputs).min())

    minimum = "KL has a minimum of 0 there"
    checks: list[Check] = [
        check("KL(θ, θ), nats", value, theory(0.0, 0.0, minimum)),
        check(
            "largest entry of its gradient",
            float(np.abs(found.gradient).max()),
            theory(None, 1e-15, f"{minimum}; round-off"),
        ),
        check(
            "its Hessian against F, relative",
            disagreement,
            theory(None, 1e-14, "F is the Hessian; round-off"),
        ),
        *(
            check(
                f"error of ½ε²dᵀFd, relative, at ε = {10 * distance:.0e} over that at "
                f"{distance:.0e}",
                ratio,
                theory(7.0, 14.0, "third-order term: 10"),
            )
            for distance, ratio in zip(_DISTANCES[2:4], decades, strict=True)
        ),
        check(
            "smallest rise of KL over 100 steps away in the outputs, nats",
            smallest_rise,
            theory(np.finfo(float).tiny, None, "log-partition functions are convex"),
        ),
        check(
            "KL to the network with permuted units, nats",
            same,
            theory(None, 1e-15, "the same function; round-off"),
        ),
        check(
            "distance to it in the parameters",
            moved,
            theory(np.finfo(float).tiny, None, "another point"),
        ),
    ]
    table = Table(
        "KL between θ and θ + εd, for a unit vector d",
        ["ε", "KL measured, nats", "½ε²dᵀFd", "relative error of that"],
        [
            [f"{distance:.0e}", f"{kl_here:.4e}", f"{by_guess:.4e}", f"{error:.1e}"]
            for distance, kl_here, by_guess, error in zip(
                _DISTANCES, measured, guess, errors, strict=True
            )
        ],
    )
    return Evidence(
        headline=(
            f"KL(θ, θ) = {value:g}; its Hessian is F to {disagreement:.0e}; a "
            f"permuted network at distance {moved:.1f} has KL {same:.0e}"
        ),
        setup=described(demonstrate, count=len(batch["y"])),
        checks=checks,
        tables=[table],
        plots=[drawn("divergence", _draw, measured, guess, found.in_outputs)],
        notes=notes(demonstrate),
    )


def _permute(params: Layers) -> Layers:
    """The same function with other parameters: hidden units in reverse order."""
    hidden, out = params
    return [
        {"w": hidden["w"][:, ::-1], "b": hidden["b"][::-1]},
        {"w": out["w"][::-1], "b": out["b"]},
    ]


def _draw(measured: np.ndarray, guess: np.ndarray, in_outputs: np.ndarray) -> Figure:
    """Draws `divergence`.

    KL over the distance in parameters: ½ε²dᵀFd is accurate while the distance is small.
    Along a straight line in output space, the KL can only increase.
    """
    figure, (left, right) = new_figure(2, width=9.0, height=3.8)
    left.loglog(_DISTANCES, guess, "--", color=COLORS["theory"], label="½ε²dᵀFd")
    left.loglog(
        _DISTANCES, measured, "o", color=COLORS["natural gradient"], label="measured"
    )
    finish(left, "KL near θ", "distance ε in parameters", "mean KL per example (nats)")
    right.plot(_PARTS, in_outputs, color=COLORS["natural gradient"])
    finish(
        right,
        "KL on the way to another network's outputs",
        "part of the way in the logits",
        "mean KL per example (nats)",
    )
    return figure


DIVERGENCE = claim_of(demonstrate)
