"""The empirical Fisher is another thing.

    F = (1/N) Σ xₙ xₙᵀ,    F̃ = (1/N) Σ rₙ² xₙ xₙᵀ,    g = (1/N) Σ rₙ xₙ

for linear regression with residuals r. Doubling the residuals doubles g, keeps F, and
makes F̃ four times as large: the natural step F⁻¹g doubles, and F̃⁻¹g halves.

Claimed: If the model's targets are replaced by those of the data, F becomes a different
matrix: its step shrinks as residuals grow, and can point away from the natural one.

Verdict: Both are true: doubling the residuals exactly doubles the natural step and
halves the empirical one, and the angle between them can approach 180° in parameters. In
the metric of the model it stays below 90°: both go downhill.

Source: Kunstner, Balles and Hennig 2019, Limitations of the empirical Fisher
approximation

Note: The steps are opposite only in the Euclidean metric. Both go downhill, since F and
F̃ are positive definite, and in the metric of the model itself, ⟨a, b⟩ = aᵀFb, the
angle between them is always less than 90°: ⟨F⁻¹g, F̃⁻¹g⟩ = gᵀF̃⁻¹g > 0. The angle in
parameters depends on the units of the inputs, as the curves for the diabetes data show:
the same problem in three units.

Note: At the optimum of a correct model, the two matrices agree in the limit of many
examples: here, with 1,000, F̃ differs from F by {apart:.0%}. Elsewhere they generally
differ.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Check, Evidence, check, literature, theory
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.texts import claim_of, described, drawn, notes
from ngd_jax.fisher import Kind

__all__ = ["EMPIRICAL_FISHER"]

_LIKELIHOOD = ngd.Gaussian(event_ndims=0)
_OTHER_KIND: Kind = "empirical"
_GRID = (-1.0, 5.0)
_SMALLEST_SHARE = 0.01  # remaining share of the way at the end of the path
_BEFORE = (
    "Measured before, independently: factors of exactly 2 and 0.5, and a smallest "
    "cosine of -0.92 on Boston housing; at which parameters and in which units was not "
    "recorded. {boston}"
)


class Data(NamedTuple):
    """A linear regression.

    Attributes:
      name: as shown to the reader.
      x: inputs with a constant, `[N, D]`.
      y: targets, `[N]`.
    """

    name: str
    x: np.ndarray
    y: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """The least-squares parameters."""
        scales = np.abs(self.x).max(0)
        return np.linalg.lstsq(self.x / scales, self.y, rcond=None)[0] / scales


def textbook_data() -> Data:
    """The data of the vector fields of Kunstner et al.: y = 2 + 2x + noise."""
    rng = np.random.default_rng(0)
    x = rng.lognormal(0.0, 0.75, 1000)
    y = 2 + 2 * x + rng.normal(size=1000)
    return Data("one input", np.stack([np.ones(1000), x], axis=1), y)


def with_constant(name: str, x: Any, y: Any) -> Data:
    """The data with one more input, which is always 1."""
    return Data(name, np.column_stack([x, np.ones(len(x))]), y)


def standardize(values: Any) -> np.ndarray:
    """Scales every column to mean 0 and standard deviation 1."""
    return (values - values.mean(0)) / values.std(0)


def tabular_data() -> list[Data]:
    """Diabetes in three units, and Boston housing in two if mlxtend is installed."""
    x, y = sklearn.datasets.load_diabetes(return_X_y=True)
    raw, _ = sklearn.datasets.load_diabetes(return_X_y=True, scaled=False)
    data = [
        with_constant("diabetes, columns of length 1", x, y),
        with_constant("diabetes, raw units", raw, y),
        with_constant("diabetes, standardised", standardize(raw), standardize(y)),
    ]
    try:
        from mlxtend.data import boston_housing_data  # pyright: ignore[reportMissingImports]
    except ImportError:
        return data
    x, y = boston_housing_data()
    return [
        *data,
        with_constant("Boston, raw units", x, y),
        with_constant("Boston, standardised", standardize(x), standardize(y)),
    ]


class Steps(NamedTuple):
    """The two steps at given parameters.

    Attributes:
      natural: F⁻¹g; all fields are JAX or NumPy arrays.
      empirical: F̃⁻¹g.
      cosine: of the angle between them.
      natural_cosine: the same in the metric F.
    """

    natural: Any
    empirical: Any
    cosine: Any
    natural_cosine: Any


def model_fn(params: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Linear, `[N]`."""
    return batch["x"] @ params


def loss_fn(params: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Half the mean squared error: nats, up to a constant."""
    return 0.5 * jnp.mean((model_fn(params, batch) - batch["y"]) ** 2)


def take_steps(
    params: jax.Array, times: jax.Array, batch: dict[str, jax.Array], kind: Kind
) -> Steps:
    """Both at the same parameters, undamped, with residuals multiplied by `times`."""
    outputs = model_fn(params, batch)
    batch = {**batch, "y": outputs + times * (batch["y"] - outputs)}
    grads = jax.grad(loss_fn)(params, batch)
    fisher = ngd.linearize_fisher(model_fn, params, batch, _LIKELIHOOD)
    other = ngd.linearize_fisher(
        model_fn, params, batch, _LIKELIHOOD, kind=kind, targets=batch["y"]
    )
    natural, _ = ngd.Cholesky()(fisher, grads, damping=0.0)
    empirical, _ = ngd.Cholesky()(other, grads, damping=0.0)
    lengths = jnp.linalg.norm(natural) * jnp.linalg.norm(empirical)
    squares = fisher.quadratic(natural) * fisher.quadratic(empirical)
    return Steps(
        natural,
        empirical,
        natural @ empirical / lengths,
        natural @ fisher.matvec(empirical) / jnp.sqrt(squares),
    )


@functools.partial(jax.jit, static_argnames="kind")
def steps_everywhere(
    params: jax.Array, times: jax.Array, batch: dict[str, jax.Array], kind: Kind
) -> Steps:
    """Steps at many parameters, `[points, D]`, with residuals `times` `[points]`."""
    # Sequentially: two batched Cholesky factorisations at the same time, on two cores,
    # may deadlock waiting for each other's threads (jaxlib 0.10.1).
    return jax.lax.map(
        lambda point: take_steps(point[0], point[1], batch, kind), (params, times)
    )


def explore(data: Data, points: np.ndarray) -> tuple[Steps, np.ndarray]:
    """Steps at `points`, and the effect of doubled residuals at the first point.

    The latter is `[2, D]`: the ratios of the natural and of the empirical step.
    """
    batch = {"x": jnp.asarray(data.x), "y": jnp.asarray(data.y)}
    times = np.ones(len(points) + 1)
    times[0] = 2
    steps = steps_everywhere(np.vstack([points[:1], points]), times, batch, _OTHER_KIND)
    steps = Steps(*map(np.asarray, steps))
    ratios = [step[0] / step[1] for step in (steps.natural, steps.empirical)]
    return Steps(*(leaf[1:] for leaf in steps)), np.array(ratios)


def demonstrate(quick: bool) -> Evidence:
    """Steps on a grid, on the way to the least-squares solution, and around it.

    Linear regression, Gaussian outputs of unit variance, both steps undamped, float64.
    One input: {examples:,} examples of y = 2 + 2x + noise, x log-normal, on a grid of
    {side} × {side} parameters. Real data: on the straight line from zero to the
    least-squares solution, which is the path of the natural gradient, and at {count}
    random parameters around its end.
    """
    side, count = (21, 200) if quick else (41, 2000)

    # 1. Two parameters, on a grid; and at the least-squares solution of a true model.
    textbook = textbook_data()
    ticks = np.linspace(*_GRID, side)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1)
    field, ratios = explore(textbook, grid.reshape(-1, 2))
    found = {textbook.name: (field.cosine, field.natural_cosine, ratios)}
    apart = _difference_at_best(textbook)

    # 2. Real data: the natural gradient's path from zero, and random parameters.
    left = np.geomspace(1, _SMALLEST_SHARE, count)
    paths = {}
    for data in tabular_data():
        noise = np.random.default_rng(1).normal(size=(count, data.x.shape[1]))
        around = data.best + noise * data.y.std() / np.abs(data.x).max(0)
        path = (1 - left[:, None]) * data.best
        steps, ratios = explore(data, np.vstack([path, around]))
        found[data.name] = (steps.cosine, steps.natural_cosine, ratios)
        paths[data.name] = steps.cosine[:count]

    errors = np.max(
        [abs(ratios / [[2], [0.5]] - 1).max(1) for _, _, ratios in found.values()], 0
    )
    smallest = {name: cosine.min() for name, (cosine, _, _) in found.items()}
    smallest_natural = min(cosine.min() for _, cosine, _ in found.values())
    can_oppose = "they can point in opposite directions (Kunstner et al. 2019)"
    checks: list[Check] = [
        check(
            "twice the residuals, natural step: error of the factor 2, relative",
            errors[0],
            theory(None, 1e-12, "F⁻¹(2g) = 2 F⁻¹g"),
        ),
        check(
            "twice the residuals, empirical step: error of the factor ½, relative",
            errors[1],
            theory(None, 1e-12, "(4F̃)⁻¹(2g) = ½ F̃⁻¹g"),
        ),
        *(
            check(
                f"smallest cosine, {name}",
                smallest[name],
                literature(-1.0, 0.0, can_oppose),
            )
            for name in smallest
            if not name.endswith("standardised")
        ),
        check(
            "smallest cosine in the metric F, everywhere",
            smallest_natural,
            theory(0.0, 1.0, "gᵀF̃⁻¹g > 0"),
        ),
    ]
    boston = [
        f"{name} {value:.3f}" for name, value in smallest.items() if "Bost" in name
    ]
    rows = [
        [
            name,
            f"{cosine.min():.3f}",
            f"{np.mean(cosine < 0):.0%}",
            f"{natural.min():.3f}",
        ]
        for name, (cosine, natural, _) in found.items()
    ]
    worst = min(smallest, key=lambda name: smallest[name])
    return Evidence(
        headline=(
            f"residuals doubled: natural step × 2, empirical step × 0.5 (relative "
            f"error {errors.max():g}); smallest cosine between them "
            f"{smallest[worst]:.3f} ({worst})"
        ),
        setup=described(demonstrate, examples=len(textbook.y), side=side, count=count),
        checks=checks,
        tables=[
            Table(
                "Angle between F⁻¹g and F̃⁻¹g",
                [
                    "data",
                    "smallest cosine",
                    "obtuse at",
                    "smallest cosine in the metric F",
                ],
                rows,
            )
        ],
        plots=[
            drawn("empirical_fisher_field", _draw_field, ticks, textbook, field),
            drawn("empirical_fisher_cosine", _draw_paths, left, paths),
        ],
        notes=[
            *notes(demonstrate, apart=apart),
            _BEFORE.format(
                boston=f"Here: {', '.join(boston)}."
                if boston
                else "Boston housing comes with the package mlxtend, which is not "
                "installed here, so the diabetes data replace it."
            ),
        ],
    )


def _difference_at_best(data: Data) -> float:
    """‖F̃ - F‖ / ‖F‖ at the least-squares solution."""
    batch = {"x": jnp.asarray(data.x), "y": jnp.asarray(data.y)}
    best = jnp.asarray(data.best)
    exact = ngd.dense_fisher(model_fn, best, batch, _LIKELIHOOD)
    other = ngd.dense_fisher(
        model_fn, best, batch, _LIKELIHOOD, kind=_OTHER_KIND, targets=batch["y"]
    )
    return float(jnp.linalg.norm(other - exact) / jnp.linalg.norm(exact))


def _draw_field(ticks: np.ndarray, data: Data, field: Steps) -> Figure:
    """Draws `empirical_fisher_field`.

    One input, two parameters. The natural step points at the least-squares solution (×)
    from everywhere; the empirical one takes detours, and in the shaded regions the
    angle between them is obtuse.
    """
    figure, axes = new_figure(2, width=9.0, height=4.4)
    side = len(ticks)
    fine = np.linspace(*_GRID, 200)
    offsets = np.stack(np.meshgrid(fine, fine), axis=-1) - data.best
    gap = ((offsets @ (data.x.T @ data.x)) * offsets).sum(-1)  # of the loss
    obtuse = field.cosine.reshape(side, side) < 0
    for axis, steps, color, title in (
        (axes[0], field.natural, COLORS["natural gradient"], "Natural: -F⁻¹g"),
        (axes[1], field.empirical, COLORS["SGD"], "Empirical: -F̃⁻¹g"),
    ):
        levels = gap.max() * 4.0 ** -np.arange(6, 0, -1)
        axis.contour(fine, fine, gap, levels, colors="#bdbdbd", linewidths=0.8)
        u, v = -np.moveaxis(steps.reshape(side, side, 2), -1, 0)
        axis.streamplot(ticks, ticks, u, v, color=color, density=0.9, linewidth=1)
        axis.plot(*data.best, "x", color="black", markersize=10, markeredgewidth=2.5)
        finish(axis, title, "intercept", "slope")
    _shade(axes[1], ticks, obtuse)
    return figure


def _shade(axis: Axes, ticks: np.ndarray, where: np.ndarray) -> None:
    axis.contourf(
        ticks, ticks, where.astype(float), [0.5, 1.5], colors=["#fdae6b"], alpha=0.4
    )


def _draw_paths(left: np.ndarray, paths: dict[str, np.ndarray]) -> Figure:
    """Draws `empirical_fisher_cosine`.

    The angle between the two steps along the path of the natural gradient, on real
    data. The curves for one data set are the same problem in different units.
    """
    figure, (axis,) = new_figure(width=8.0, height=4.2)
    styles = {"diabetes": "-", "Boston": "--"}
    shades = ("#d94801", "#08519c", "#238b45", "#807dba", "#636363")
    for (name, cosine), color in zip(paths.items(), shades, strict=False):
        style = styles[name.split(",")[0]]
        axis.semilogx(left, cosine, style, color=color, linewidth=2, label=name)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.invert_xaxis()
    axis.set_ylim(-1.05, 1.05)
    finish(
        axis,
        "From zero to least squares",
        "part of the way that is left",
        "cosine between natural and empirical step",
        legend=False,
    )
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    return figure


EMPIRICAL_FISHER = claim_of(demonstrate)
