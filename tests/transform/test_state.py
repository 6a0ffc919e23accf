"""The state before the first step: buffers of its own, dtypes, words."""

import jax
import jax.numpy as jnp
import pytest

from ngd_jax.transform.state import StepStatus, initial_state


@pytest.mark.parametrize("keeps_direction", [False, True])
def test_no_two_leaves_share_a_buffer(keeps_direction):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    state = initial_state(
        params, damping=0.1, keeps_direction=keeps_direction, solver_state=()
    )
    leaves = jax.tree.leaves(state)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves}
    assert len(pointers) == len(leaves) == 11 + 2 * keeps_direction


def test_numbers_are_as_wide_as_the_parameters_or_float32(x64):
    for dtype, wide in (("bfloat16", "float32"), ("float64", "float64")):
        params = jnp.ones(2, dtype)
        state = initial_state(
            params, damping=0.5, keeps_direction=True, solver_state=()
        )
        assert state.damping.dtype == state.info.measured_kl.dtype == wide
        assert state.direction.dtype == wide
        assert state.count.dtype == state.info.status.dtype == "int32"
        assert state.damping == 0.5


def test_every_status_has_a_message():
    messages = [status.message for status in StepStatus]
    assert len(set(messages)) == len(StepStatus)
    for status in StepStatus:
        assert status.message.startswith("Refused") != status.is_taken
