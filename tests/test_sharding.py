"""Whole steps on 8 devices, with every solver, against the same on one."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from tests.marks import long_unless
from tests.sharded_program import LAYOUTS, SOLVERS

# Solvers on products never need the examples of another device. The Gram matrix is of
# pairs of examples, so its rows must meet; and a dense F is built by products in bulk.
GATHERS = {
    "blocks",
    "cholesky",
    "damping_search",
    "default",
    "jacobi",
    "sample_space",
    "svd",
}


def run(program, *arguments):
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run(
        [sys.executable, "-m", f"tests.{program}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("names", "layouts", "dtypes"),
    [
        pytest.param(
            ("cg", "kfac"),
            ("two-auto", "fsdp-explicit"),
            ("float64",),
            id="quick",
            marks=pytest.mark.long,
        ),
        *(
            pytest.param(
                (name,),
                tuple(LAYOUTS),
                ("float32", "float64"),
                id=name,
                marks=pytest.mark.slow,
            )
            for name in SOLVERS
        ),
    ],
)
def test_steps_are_the_same_on_eight_devices(names, layouts, dtypes):
    """Momentum, or a warm start, and the radius; batch and parameters divided or not.

    With automatic mesh axes, and with explicit ones (jax 0.12's default).
    """
    found = run("sharded_program", *map(",".join, (names, layouts, dtypes)))
    assert len(found) == len(names) * len(layouts) * len(dtypes)
    for place, report in found.items():
        assert report["error"] is None, (place, report)
        assert report["status"] == 0, place
        assert report["devices"] == 8, place
        tolerance = 1e-5 if "float32" in place else 1e-10
        assert report["difference"] <= tolerance, (place, report)
        name, layout, _ = place.split()
        if layout in ("auto", "two-auto") and name not in GATHERS:
            assert report["gathered"] == 0, (place, report)


@pytest.mark.long
def test_divided_factors_and_parameters():
    found = run("sharded_curvature")
    shapes = found.pop("gathers")
    of_gradient = set(shapes.pop("gradient"))
    for name, gathered in shapes.items():
        for shape in set(gathered) - of_gradient:
            assert math.prod(map(int, shape.split(","))) < 2**16, (name, shape)
    for way, difference in found.pop("redivided").items():
        assert difference <= 1e-10, way
    shares = found.pop("shares")
    assert max(shares.values()) <= 1.15 / 8, shares
    for place, report in found.items():
        assert report["status"] == 0, place
        assert report["difference"] <= 1e-10, (place, report)
        # A few small sides, of which every device has at least one row.
        num_parts = 8 if "model" in place else 4
        assert report["before"] == report["after"] <= 1.2 / num_parts, (place, report)


@pytest.mark.long
def test_divided_gram_matrix():
    """No device has all of it, nor more than its share of the work."""
    for place, report in run("sharded_gram").items():
        assert report["difference"] <= 1e-10, (place, report)
        assert report["operations"] <= 1.1 / 8, (place, report)
        # Beside its rows of the matrix, a device has the rows of A of one block.
        limit = 1.1 / 8 if "solve" in place else 0.3
        assert report["bytes"] <= limit, (place, report)
        assert report["exchanged"] < 512**2 / 4, (place, report)
        if "solve" in place:
            num_steps, residual, status = report["info"]
            assert num_steps < 100
            assert residual < 1e-12
            assert status == 0


@pytest.mark.parametrize("check_vma", long_unless([True], [True, False]))
def test_a_step_inside_shard_map_raises(check_vma):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    tx = ngd.natural_gradient(1.0, lambda w, x: x @ w, ngd.Gaussian())
    w, x = jnp.ones((2, 1)), jnp.ones((4, 2))

    def update(w, x):
        return tx.update(w, tx.init(w), w, batch=x)[0]

    def mapped(spec):
        return jax.shard_map(
            update, mesh=mesh, in_specs=(P(), spec), out_specs=P(), check_vma=check_vma
        )

    with pytest.raises(ValueError, match=r"inside jax.shard_map or .* along 'data'"):
        mapped(P("data"))(w, x)
    if check_vma:  # every device does the same
        jax.jit(mapped(P())).lower(w, x)
