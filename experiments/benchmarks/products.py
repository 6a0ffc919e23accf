"""The first tables: the cost of a product, of a whole step, and one-time costs."""

from collections.abc import Sequence

import jax
import optax

import ngd_jax as ngd
from experiments.benchmarks.clocks import (
    compile_seconds,
    import_seconds,
    interleaved_seconds,
)
from experiments.benchmarks.contestants import (
    Problem,
    check_taken,
    count_parameters,
    make_problem,
    natural_step,
    price_of_products,
    products,
    program_step,
    train_step,
)
from experiments.benchmarks.markdown import Figure, Table, goal_of, value_of
from experiments.benchmarks.settings import ProductsSettings

__all__ = [
    "measure_network",
    "measure_setup",
    "network_name",
    "product_tables",
    "tabulate",
]


def product_tables(settings: ProductsSettings) -> list[Table]:
    """Both tables: costs per network, and one-time costs."""
    columns = {
        network_name(widths, settings.batch_size): measure_network(
            widths,
            batch_size=settings.batch_size,
            cg_steps=settings.cg_steps,
            repeats=settings.repeats,
        )
        for widths in settings.networks
    }
    setup = measure_setup(
        settings.networks[0],
        batch_size=settings.batch_size,
        compile_repeats=settings.compile_repeats,
        import_repeats=settings.import_repeats,
    )
    return [tabulate("Products and steps", columns), tabulate("Once", {"": setup})]


def tabulate(title: str, columns: dict[str, list[Figure]]) -> Table:
    """Figures with the same names, one column for each network, and their goals."""
    rows = [
        [row[0].name, *map(value_of, row), goal_of(row[0])]
        for row in zip(*columns.values(), strict=True)
    ]
    return Table(title, ["", *columns, "goal"], rows)


def measure_network(
    widths: Sequence[int], *, batch_size: int, cg_steps: int, repeats: int
) -> list[Figure]:
    """Costs of products and steps on one network, in gradients."""
    problem = make_problem(widths, batch_size)
    return [
        *_count_operations(problem),
        *_time_products(problem, cg_steps=cg_steps, repeats=repeats),
        *_time_step(problem, cg_steps=cg_steps, repeats=repeats),
    ]


def _count_operations(problem: Problem) -> list[Figure]:
    lone, further = price_of_products(problem)
    return [
        Figure("a lone product, operations / gradient", lone, 1.67),
        Figure("a further product, operations / gradient", further),
    ]


def _time_products(problem: Problem, *, cg_steps: int, repeats: int) -> list[Figure]:
    args = (problem.params, problem.batch)
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    alone = jax.jit(products(problem, 1))

    def solve(steps: int):
        solver = ngd.CG(max_steps=steps, rtol=0.0)

        @jax.jit
        def run(params, batch, vector):
            fisher = problem.linearize(params, batch)
            return solver(fisher, vector, damping=1e-3)

        return run

    def multiply(count: int):
        @jax.jit
        def run(params, batch, vector):
            fisher = problem.linearize(params, batch)
            return jax.lax.fori_loop(0, count, lambda _, v: fisher.matvec(v), vector)

        return run

    _, right_side = gradient(*args)
    counts = (cg_steps, 3 * cg_steps)
    solves = [solve(count) for count in counts]
    for run, count in zip(solves, counts, strict=True):
        taken = int(run(*args, right_side)[1].num_steps)
        if taken != count:
            raise RuntimeError(f"{taken} CG steps were taken where {count} were timed")
    timed = [alone, *(multiply(count) for count in counts), *solves]
    one, *rest = interleaved_seconds(
        [
            lambda: gradient(*args),
            *(lambda run=run: run(*args, right_side) for run in timed),
        ],
        repeats=repeats,
    )
    lone, few_products, many_products, few_steps, many_steps = rest
    further = 2 * cg_steps * one
    return [
        Figure("one gradient, CPU ms", 1e3 * one),
        Figure("a lone product, time / gradient", lone / one, 1.6),
        Figure(
            "a further product in a loop, time / gradient",
            (many_products - few_products) / further,
            1.3,
        ),
        Figure(
            "a further CG step (product and vectors), time / gradient",
            (many_steps - few_steps) / further,
        ),
    ]


def _time_step(problem: Problem, *, cg_steps: int, repeats: int) -> list[Figure]:
    gradient = jax.jit(jax.value_and_grad(problem.loss_fn))
    step, args = natural_step(problem, ngd.CG(max_steps=cg_steps, rtol=0.0))
    step = jax.jit(step)
    info = check_taken(step(*args)[1])
    seconds = interleaved_seconds(
        [lambda: gradient(problem.params, problem.batch), lambda: step(*args)],
        repeats=repeats,
    )
    return [
        Figure(
            f"a whole step to the radius, {cg_steps} CG steps, time / gradient",
            seconds[1] / seconds[0],
            18.0,
        ),
        Figure("forward passes for the measured KL", float(info.num_kl_evaluations)),
    ]


def measure_setup(
    widths: Sequence[int], *, batch_size: int, compile_repeats: int, import_repeats: int
) -> list[Figure]:
    """One-time costs: compilation relative to Adam's, and the import."""
    problem = make_problem(widths, batch_size)

    def contestant(tx: optax.GradientTransformation):
        def make():
            step, opt_state = train_step(problem, tx)
            return step, (problem.params, opt_state, problem.batch)

        return make

    natural = ngd.natural_gradient(
        1.0, problem.model_fn, problem.likelihood, max_kl=1e-2
    )
    adam, ours, program_adam, program_ours = compile_seconds(
        [
            contestant(optax.adam(1e-3)),
            contestant(natural),
            lambda: program_step("adam"),
            lambda: program_step("natural_gradient"),
        ],
        repeats=compile_repeats,
    )
    added = import_seconds("ngd_jax", after=("jax", "optax"), repeats=import_repeats)
    return [
        Figure("compiling the program's training step with Adam, CPU s", program_adam),
        Figure("the same with ours, times Adam's", program_ours / program_adam, 2.5),
        Figure("compiling a bare Adam step, CPU s", adam),
        Figure("a bare step of ours, times Adam's", ours / adam, 2.5),
        Figure("import ngd_jax after jax and optax, CPU s", added, 0.15),
    ]


def network_name(widths: Sequence[int], batch_size: int) -> str:
    """The head of a column: the widths and the number of parameters."""
    count = count_parameters(make_problem(widths, batch_size))
    return f"{'-'.join(map(str, widths))} ({count:,} parameters)"
