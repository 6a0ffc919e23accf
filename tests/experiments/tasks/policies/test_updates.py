"""Updates of policies: identities of the theory, and loops over examples."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from experiments.tasks.policies.updates import (
    clipped_loss,
    entropy,
    make_clipped_update,
    make_whole_update,
    policy_task,
    surrogate_loss,
)


def table_policy(params, batch):
    """Logits of a table, one row for each state."""
    return params[batch["states"]]


def make_model(policy_fn=table_policy, likelihood=None):
    return policy_task(policy_fn, lambda _: None, likelihood or ngd.Categorical())


def random_mdp(rng, num_states=4, num_actions=3, discount=0.9):
    """Transitions, rewards, a softmax policy, and by linear algebra what follows.

    Returns:
      The logits, the discounted state distribution (of sum one), the policy and the
      advantages.
    """
    transitions = rng.dirichlet(np.ones(num_states), (num_states, num_actions))
    rewards = rng.normal(size=(num_states, num_actions))
    start = rng.dirichlet(np.ones(num_states))
    logits = rng.normal(size=(num_states, num_actions))
    policy = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    chain = np.einsum("sa,sat->st", policy, transitions)
    resolvent = np.linalg.inv(np.eye(num_states) - discount * chain)
    values = resolvent @ (policy * rewards).sum(1)
    advantages = rewards + discount * transitions @ values - values[:, None]
    visits = (1 - discount) * start @ resolvent
    return logits, visits, policy, advantages


@pytest.mark.long
def test_natural_policy_gradient_of_a_table_is_its_advantages(x64, rng):
    """F⁺ ∇J = A / (1 - γ), up to a constant in each state (Kakade 2001)."""
    discount = 0.9
    logits, visits, policy, advantages = random_mdp(rng, discount=discount)
    pairs = np.array(list(itertools.product(*map(range, logits.shape))))
    states, actions = pairs.T
    weights = visits[states] * policy[states, actions]
    batch = {
        "states": jnp.asarray(states),
        "actions": jnp.asarray(actions),
        "log_probs": jnp.asarray(np.log(policy[states, actions])),
        # The surrogate is a plain mean over pairs, so their weights go in here.
        "advantages": jnp.asarray(
            len(pairs) * weights * advantages[states, actions] / (1 - discount)
        ),
        "weights": jnp.asarray(weights),
    }
    model = make_model()
    tx = ngd.natural_gradient(
        1.0,
        model.model_fn,
        model.likelihood,
        damping=1e-12,
        solver=ngd.Cholesky(),
        metric=ngd.Metric(weights_fn=lambda batch: batch["weights"]),
    )
    params = jnp.asarray(logits)
    grads = jax.grad(model.loss_fn)(params, batch)
    step, _ = tx.update(grads, tx.init(params), params, batch=batch)
    expected = advantages / (1 - discount)
    np.testing.assert_allclose(
        step - step.mean(1, keepdims=True),
        expected - expected.mean(1, keepdims=True),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.fixture
def rollout(rng):
    """A table, and a batch that it could have drawn."""
    params = jnp.asarray(rng.normal(size=(5, 3)))
    states = jnp.asarray(rng.integers(0, 5, 40))
    actions = jnp.asarray(rng.integers(0, 3, 40))
    log_probs = jax.nn.log_softmax(params[states])[jnp.arange(40), actions]
    advantages = jnp.asarray(rng.normal(size=40))
    batch = {
        "states": states,
        "actions": actions,
        "log_probs": log_probs,
        "advantages": advantages,
    }
    return params, batch


def test_gradient_of_the_surrogate_at_the_old_policy_is_the_policy_gradient(
    x64, rollout
):
    params, batch = rollout
    grads = jax.grad(make_model().loss_fn)(params, batch)
    expected = np.zeros(params.shape)
    probabilities = np.asarray(jax.nn.softmax(params))
    for state, action, advantage in zip(
        *(np.asarray(batch[name]) for name in ("states", "actions", "advantages")),
        strict=True,
    ):
        score = -probabilities[state]
        score[action] += 1.0
        expected[state] -= advantage * score / 40
    np.testing.assert_allclose(grads, expected, rtol=1e-10, atol=1e-12)


def test_losses_equal_loops_over_examples(x64, rollout, rng):
    params, batch = rollout
    moved = params + 0.5 * jnp.asarray(rng.normal(size=params.shape))
    outputs = table_policy(moved, batch)
    plain, clipped = 0.0, 0.0
    logs = np.asarray(jax.nn.log_softmax(outputs))
    for n in range(40):
        ratio = math.exp(logs[n, batch["actions"][n]] - batch["log_probs"][n])
        gain = float(batch["advantages"][n])
        plain -= ratio * gain / 40
        clipped -= min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain) / 40
    likelihood = ngd.Categorical()
    np.testing.assert_allclose(surrogate_loss(likelihood, outputs, batch), plain)
    np.testing.assert_allclose(clipped_loss(likelihood, 0.2, outputs, batch), clipped)
    assert clipped > plain


def test_entropies_equal_their_definitions(x64, rng):
    logits = rng.normal(size=(6, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    value = entropy(ngd.Categorical(), jnp.asarray(logits))
    np.testing.assert_allclose(value, np.mean(-np.sum(p * np.log(p), 1)))

    log_scale = np.array([[0.3, -1.0]])
    grid = np.linspace(-12, 12, 20001)
    expected = 0.0
    for scale in np.exp(log_scale[0]):
        density = np.exp(-0.5 * (grid / scale) ** 2) / (scale * math.sqrt(2 * math.pi))
        expected -= np.trapezoid(density * np.log(density + 1e-300), grid)
    outputs = {"mean": jnp.ones((1, 2)), "log_scale": jnp.asarray(log_scale)}
    value = entropy(ngd.DiagonalGaussian(), outputs)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def gaussian_policy(params, batch):
    mean = batch["states"] @ params["weights"]
    return {
        "mean": mean,
        "log_scale": jnp.broadcast_to(params["log_scale"], mean.shape),
    }


@pytest.mark.long
def test_update_goes_to_the_radius_and_learns_the_width_of_actions(x64, rng):
    params = {"weights": jnp.zeros((3, 2)), "log_scale": jnp.zeros(2)}
    states = jnp.asarray(rng.normal(size=(200, 3)))
    actions = jnp.asarray(rng.normal(size=(200, 2)))
    model = make_model(gaussian_policy, ngd.DiagonalGaussian())
    batch = {"states": states, "actions": actions}
    batch["log_probs"] = model.likelihood.log_prob(
        model.model_fn(params, batch), actions
    )
    # Small actions are good ones: the width must shrink.
    batch["advantages"] = 1 - jnp.sum(actions**2, axis=1)
    tx = ngd.natural_gradient(
        None,
        model.model_fn,
        model.likelihood,
        max_kl=0.01,
        loss_fn=model.output_loss_fn,
        accept=ngd.SufficientDecrease(0.1, max_halvings=0),
    )
    update = make_whole_update(tx, model, measure_kl=True)
    new, _, records = jax.jit(update)(params, tx.init(params), batch, jax.random.key(0))
    assert records["accepted"] == 1
    assert (new["log_scale"] < -0.01).all()
    kl = ngd.mean_kl(model.model_fn, params, new, batch, model.likelihood)
    np.testing.assert_allclose(records["measured_kl"], kl, rtol=1e-9)
    assert 0.009 <= kl <= 0.01
    gain = model.loss_fn(params, batch) - model.loss_fn(new, batch)
    np.testing.assert_allclose(records["improvement"], gain, rtol=1e-9)
    assert records["improvement"] >= 0.1 * records["expected_improvement"] > 0


def test_step_that_makes_the_surrogate_worse_is_refused(x64, rollout):
    """The old probabilities are wrong, so the promised gain does not come."""
    params, batch = rollout
    model = make_model()
    tx = ngd.natural_gradient(
        None,
        model.model_fn,
        model.likelihood,
        max_kl=5.0,
        loss_fn=model.output_loss_fn,
        accept=ngd.SufficientDecrease(0.9, max_halvings=0),
    )
    update = make_whole_update(tx, model, measure_kl=True)
    new, _, records = jax.jit(update)(params, tx.init(params), batch, jax.random.key(0))
    assert records["accepted"] == 0
    assert records["status"] == ngd.StepStatus.NO_REDUCTION
    assert records["measured_kl"] == 0
    np.testing.assert_array_equal(new, params)


@pytest.mark.slow
def test_without_any_advantage_nothing_moves(rollout):
    params, batch = rollout
    params = params.astype(jnp.float32)
    model = make_model()
    tx = ngd.natural_gradient(None, model.model_fn, model.likelihood, max_kl=0.01)
    update = make_whole_update(tx, model, measure_kl=True)
    batch = {**batch, "advantages": jnp.zeros(40)}
    new, _, records = jax.jit(update)(params, tx.init(params), batch, jax.random.key(0))
    np.testing.assert_array_equal(new, params)
    assert records["accepted"] == 1


@pytest.mark.slow
def test_clipped_update_of_one_whole_minibatch_is_a_step_on_the_surrogate(x64, rollout):
    """At ratio one nothing is clipped yet."""
    params, batch = rollout
    model = make_model()
    sgd = optax.sgd(0.1)
    update = make_clipped_update(
        sgd, model, clip=0.2, epochs=1, minibatch_size=40, measure_kl=True
    )
    new, _, records = jax.jit(update)(
        params, sgd.init(params), batch, jax.random.key(0)
    )
    expected = params - 0.1 * jax.grad(model.loss_fn)(params, batch)
    np.testing.assert_allclose(new, expected, rtol=1e-10)
    kl = ngd.mean_kl(model.model_fn, params, new, batch, model.likelihood)
    np.testing.assert_allclose(records["measured_kl"], kl, rtol=1e-9)
