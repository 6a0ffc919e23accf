"""Plans of large models: counts that can be checked by hand."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.deep import Transformer, operations, plan


def test_operations_are_those_of_the_products_in_loops_too():
    def program(x, w):
        return jax.lax.scan(lambda x, w: (jax.jit(jnp.dot)(x, w), None), x, w)[0]

    jaxpr = jax.make_jaxpr(program)(jnp.ones((5, 4)), jnp.ones((3, 4, 4)))
    assert operations(jaxpr.jaxpr) == 3 * 2 * 5 * 4 * 4


@pytest.mark.long
def test_a_plan_divides_over_devices_and_has_the_work_of_a_checkpointed_gradient():
    model = Transformer(4, 64, 4, num_tokens=64, context=16)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    num_params = sum(x.size for x in jax.tree.leaves(shapes))
    alone, divided = (plan(model, n, 32, 2048) for n in (1, 4))
    assert alone["state, bytes"][0] == 8 * num_params
    for name in ("parameters and gradient, bytes", "state, bytes"):
        for one, part in zip(alone[name], divided[name], strict=True):
            assert part == pytest.approx(one / 4, rel=0.1), name
    # Two forward passes and one backward, of twice the work, over the matrices; but the
    # last product of a layer is not computed again. Attention itself is little.
    matrices, last, head = 4 * 12 * 64**2, 4 * 4 * 64**2, 64 * 64
    least = 32 * 2 * (4 * matrices - last + 3 * head)
    adam, kfac = divided["operations in a step"]
    assert least < adam < 1.2 * least
    assert kfac > 2 * adam
    assert alone["received in a step, bytes"] == (0, 0)
