"""Batches and parameters that are spread over devices."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import ngd_jax as ngd
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests import reference

assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
params = reference.network_params(rng, 4, num_hidden=8)
x = jnp.asarray(rng.normal(size=(64, 2)), jnp.float32)
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

@jax.jit
def everything(params, x):
    fisher = ngd.linearize_fisher(reference.network, params, x, ngd.Categorical())
    d, info = ngd.CG(max_steps=8)(fisher, params, damping=1.0)
    return fisher.matvec(params), fisher.kl(jax.tree.map(lambda p: 1.1 * p, params)), d

truth = everything(params, x)
sharded_x = jax.device_put(x, NamedSharding(mesh, P("data")))
spec = jax.tree.map(lambda p: P(), params)
spec["hidden"]["w"] = P(None, "model")
spec["out"][0] = P("model", None)
sharded_params = jax.device_put(
    params, jax.tree.map(lambda s: NamedSharding(mesh, s), spec,
                         is_leaf=lambda s: isinstance(s, P)))
for arguments in ((params, sharded_x), (sharded_params, sharded_x)):
    result = everything(*arguments)
    for a, b in zip(jax.tree.leaves(truth), jax.tree.leaves(result), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())
print("same")
"""


def test_sharded_batch_and_parameters_give_the_same():
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "same", result.stderr[-3000:]
