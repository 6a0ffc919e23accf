"""It costs more than gradient descent.

For a network with P weights, P₁ of them in the first layer, and N examples, a gradient
takes 6NP - 2NP₁ multiplications, the linearisation 2NP, and a further Fisher product
with the linearisation given 8NP - 4NP₁. So a product is at most 4/3 of a gradient, and
a step with k of them costs 1 + 4k/3 gradients.

Claimed: A natural gradient step costs more than one of gradient descent: a Fisher
product costs at most 4/3 of a gradient, and a step with k products about 1 + 4k/3
gradients.

Verdict: True. In operations, a product stays within the bound, and well below it if the
first layer is a large part of the network. In time, a whole step costs about 1 + 4k/3
gradients, plus the forward passes that measure its KL.

Source: Martens 2010, Deep learning via Hessian-free optimization

Note: So a natural gradient step is never as cheap as one of gradient descent, and must
make up for it by fewer steps. The cost can be reduced by fewer products, with a warm
start or a preconditioner, by the metric on a part of the batch, or by a direct solve if
there are few examples; `python -m experiments.benchmark table=solvers` measures these
costs.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.clocks import interleaved_seconds
from experiments.benchmarks.contestants import (
    Problem,
    check_taken,
    count_parameters,
    make_problem,
    natural_step,
    price_of_products,
)
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Check, Evidence, check, theory
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.texts import claim_of, described, drawn, notes

__all__ = ["COST"]

_BATCH_SIZE = 256
_SMALL = (64, 128, 64, 10)
_NETWORKS = (_SMALL, (784, 1000, 300, 10))
# Activations, biases and the likelihood, which the count does not include.
_TOLERANCE = 0.08


class _Prices(NamedTuple):
    """The costs on one network.

    Attributes:
      name: its widths and its number of parameters.
      product: operations of a further product, in gradients.
      lone: the same including the linearisation.
      product_expected, lone_expected: by counting multiplications.
      gradient: CPU seconds.
      steps: CPU time of a whole step, in gradients, for each number of products.
      kl_evaluations: forward passes for the radius, likewise.
    """

    name: str
    product: float
    lone: float
    product_expected: float
    lone_expected: float
    gradient: float
    steps: Sequence[float]
    kl_evaluations: Sequence[int]


def demonstrate(quick: bool) -> Evidence:
    """Multilayer perceptrons of 17 thousand to a million parameters.

    Tanh networks with softmax outputs, {_BATCH_SIZE} examples, float32. Operations are
    counted by the compiler. Times are CPU times of the whole process, each the median
    over turns in one process; they depend on the machine, so they are reported without
    a range. A step is a gradient, k products of conjugate gradients, and the search for
    the radius, 0.01 nats.
    """
    networks = [_SMALL] if quick else _NETWORKS
    counts = (5, 20) if quick else (5, 10, 20)
    prices = [_price(widths, counts, repeats=3 if quick else 5) for widths in networks]
    checks: list[Check] = []
    for price in prices:
        for name, measured, expected in (
            ("a further product", price.product, price.product_expected),
            ("a lone product, linearised for it", price.lone, price.lone_expected),
        ):
            checks.append(
                check(
                    f"{name}, operations in gradients, {price.name}",
                    measured,
                    theory(
                        expected * (1 - _TOLERANCE),
                        expected * (1 + _TOLERANCE),
                        "count of multiplications",
                    ),
                )
            )
    longest = max(counts)
    dearest = max(price.steps[-1] for price in prices)
    return Evidence(
        headline=(
            f"a product costs {prices[-1].product:.2f} gradients in operations; a "
            f"whole step with {longest} products costs up to {dearest:.0f} in time, "
            f"where 1 + 4k/3 is {1 + 4 * longest / 3:.0f}"
        ),
        setup=described(demonstrate),
        checks=checks,
        tables=[_tabulate(prices, counts)],
        plots=[drawn("cost", _draw, prices, counts)],
        notes=notes(demonstrate),
    )


def _price(widths: Sequence[int], counts: Sequence[int], *, repeats: int) -> _Prices:
    problem = make_problem(widths, _BATCH_SIZE)
    lone, product = price_of_products(problem)
    product_expected, lone_expected = _multiplications(widths)
    steps = [_step(problem, count) for count in counts]
    evaluations = [
        int(check_taken(run()[1]).num_kl_evaluations)  # also warms it up
        for run in steps
    ]
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    one, *seconds = interleaved_seconds(
        [lambda: gradient(problem.params, problem.batch), *steps], repeats=repeats
    )
    return _Prices(
        name=f"{'-'.join(map(str, widths))} ({count_parameters(problem):,} parameters)",
        product=product,
        lone=lone,
        product_expected=product_expected,
        lone_expected=lone_expected,
        gradient=one,
        steps=[taken / one for taken in seconds],
        kl_evaluations=evaluations,
    )


def _multiplications(widths: Sequence[int]) -> tuple[float, float]:
    """Operations of a further and of a lone product by hand, in gradients.

    See the docstring of this module.
    """
    weights = [a * b for a, b in itertools.pairwise(widths)]
    gradient = 6 * sum(weights) - 2 * weights[0]
    product = 8 * sum(weights) - 4 * weights[0]
    return product / gradient, (product + 2 * sum(weights)) / gradient


def _step(problem: Problem, count: int) -> Callable[[], Any]:
    step, args = natural_step(problem, ngd.CG(max_steps=count, rtol=0.0))
    compiled = jax.jit(step)
    return lambda: compiled(*args)


def _tabulate(prices: Sequence[_Prices], counts: Sequence[int]) -> Table:
    rows = [
        ["one gradient, CPU ms", *(f"{1e3 * price.gradient:.3g}" for price in prices)],
        [
            "a further product, operations in gradients",
            *(f"{price.product:.3g}" for price in prices),
        ],
    ]
    for index, count in enumerate(counts):
        name = f"a whole step of {count} products in gradients, CPU time"
        cells = [
            f"{price.steps[index]:.3g} ({price.kl_evaluations[index]} KL evaluations)"
            for price in prices
        ]
        rows.append([f"{name}; 1 + 4k/3 = {1 + 4 * count / 3:.3g}", *cells])
    head = ["", *(price.name for price in prices)]
    return Table("Prices, in gradients of the same network", head, rows)


def _draw(prices: Sequence[_Prices], counts: Sequence[int]) -> Figure:
    """Draws `cost`.

    Cost of a step over its number of products. The dashed line is the largest cost of
    one gradient and the products by operation count; the forward passes that measure
    the KL are extra.
    """
    figure, (axis,) = new_figure()
    ends = [0, max(counts)]
    axis.plot(
        ends,
        [1 + 4 * k / 3 for k in ends],
        "--",
        color=COLORS["theory"],
        label="1 + 4k/3: one gradient, k products",
    )
    colors = (COLORS["SGD"], COLORS["natural gradient"])
    for price, color, marker in zip(prices, colors, "os", strict=False):
        axis.plot(counts, price.steps, f"{marker}-", color=color, label=price.name)
    axis.axhline(1.0, color=COLORS["theory"], alpha=0.5)
    axis.annotate(
        "gradient descent",
        (ends[1], 1.0),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=COLORS["theory"],
    )
    axis.set_ylim(bottom=0)
    axis.set_xticks([0, *counts])
    finish(
        axis,
        "What a step to the KL radius costs",
        "Fisher products in a step, k",
        "CPU time of a step (gradients)",
    )
    return figure


COST = claim_of(demonstrate, x64=False, is_timed=True)
