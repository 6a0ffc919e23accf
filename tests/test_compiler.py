"""The compiler computes the expression on which every softmax Fisher product rests."""

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

ISSUE = "https://github.com/jax-ml/jax/issues/39103"


@pytest.mark.parametrize("num_classes", [3, 10])
@pytest.mark.parametrize("num_rows", [8192, 16384, 20000])
def test_softmax_fisher_product_is_compiled_correctly(num_rows, num_classes):
    # The form that is known to fail: p shared by all rows, each row under vmap.
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(num_classes)).astype(np.float32)
    t = rng.normal(size=(num_rows, num_classes)).astype(np.float32)

    @jax.jit
    def product(p, t):
        def row(t):
            return p * (t - jnp.sum(p * t, -1, keepdims=True))

        return jax.vmap(row)(t)

    truth = p * (t - np.sum(p.astype(float) * t, -1, keepdims=True))
    wrong = np.abs(np.asarray(product(p, t)) - truth).max(-1) > 1e-5
    assert not wrong.any(), (
        f"jaxlib {jaxlib.__version__} miscompiles p * (t - sum(p * t)) in "
        f"{wrong.sum()} of {num_rows} rows, from row {wrong.argmax()}: Fisher products "
        f"would be silently wrong. See {ISSUE} and install another jaxlib."
    )


@pytest.mark.parametrize(
    ("dtype", "num_rows"), [(jnp.float64, 16_385), (jnp.float32, 32_769)]
)
def test_vmapped_product_and_reduction_is_compiled_correctly(dtype, num_rows):
    # The reproducer of the issue: |M x|² of each row, with M the identity.
    with jax.enable_x64(True):
        count = jnp.arange(num_rows, dtype=dtype)
        rows = jnp.stack((count, jnp.zeros_like(count), jnp.zeros_like(count)), axis=1)
        matrix = jnp.eye(3, dtype=dtype)
        squares = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
        truth = np.arange(num_rows, dtype=float) ** 2
        np.testing.assert_allclose(squares, truth, rtol=1e-5, err_msg=ISSUE)
