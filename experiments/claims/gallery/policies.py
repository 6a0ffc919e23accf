"""Policies: the step of TRPO, and the tabular natural policy gradient.

    d = (F + λI)⁻¹ ∇J,    step = s d with KL(π_θ ‖ π_θ+sd) = δ

For a table of logits and states weighted by their visits, F⁺ ∇J = A / (1 - γ), with the
advantages A centred over actions.
"""

import jax
import jax.numpy as jnp
import numpy as np

import ngd_jax as ngd
from experiments.claims.claim import check, promise
from experiments.claims.gallery.identity import (
    Identity,
    compiled,
    descend,
    equal,
    text_of,
    unequal,
)

__all__ = ["policy_gradient", "trpo"]

_RADIUS, _DAMPING = 1e-2, 1e-3  # nats; as in ngd.contrib.presets.trpo()
_NUM_STATES = 200
_DISCOUNT = 0.9
_RATE = 0.5


def natural_trpo(weights, batch):
    """A step to the KL radius, accepted if the surrogate gains enough."""

    def policy_fn(weights, batch):  # maps states to logits of actions
        return batch["states"] @ weights

    def surrogate_fn(weights, batch):  # minus the importance-weighted advantage
        log_policy = jax.nn.log_softmax(policy_fn(weights, batch))
        chosen = jnp.take_along_axis(log_policy, batch["actions"][:, None], 1)[:, 0]
        return -jnp.mean(jnp.exp(chosen - batch["log_policy"]) * batch["advantages"])

    tx = ngd.natural_gradient(
        model_fn=policy_fn, likelihood=ngd.Categorical(), **ngd.contrib.presets.trpo()
    )
    moved, state = descend(tx, surrogate_fn, weights, batch)
    scale = state.info.step_scale[-1]
    return (moved[-1] - weights) / scale, scale


def trpo_direction(weights, batch, num_steps=10):
    """Ten steps of conjugate gradients on (F + λI) d = ∇J."""
    x, policy = batch["states"], softmax(batch["states"] @ weights)
    scores = np.eye(policy.shape[1])[batch["actions"]] - policy
    gradient = x.T @ (scores * batch["advantages"][:, None]) / len(x)

    def product(v):
        t = x @ v
        centred = t - np.sum(policy * t, axis=1, keepdims=True)
        return x.T @ (policy * centred) / len(x) + _DAMPING * v

    d, r, p = np.zeros_like(gradient), gradient, gradient
    for _ in range(num_steps):
        image, squared = product(p), np.sum(r * r)
        alpha = squared / np.sum(p * image)
        d, r = d + alpha * p, r - alpha * image
        p = r + np.sum(r * r) / squared * p
    # TRPO's own length: the radius in the quadratic model, which includes damping.
    return d, np.sqrt(2 * _RADIUS / np.sum(d * product(d)))


def softmax(logits):
    """Probabilities, along the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def mean_kl(weights, step, states):
    """Mean of Σ π log(π / π'), nats."""
    old, new = softmax(states @ weights), softmax(states @ (weights + step))
    return float(np.mean(np.sum(old * np.log(old / new), axis=1)))


def trpo(quick: bool) -> Identity:
    """On linear policies with random states: directions, and lengths of the steps.

    Condition: The gradient is that of the surrogate at the old policy. The direction is
    that of TRPO; the length is not. TRPO takes √(2δ/dᵀ(F+λI)d), here with a KL of
    {shortest:.2f} to {longest:.2f} δ, and halves it until the KL is below δ (then
    {least:.2f} to {most:.2f} δ). Our length is found by measuring the KL
    ({our_least:.2f} to {our_most:.2f} δ).

    Source: Schulman et al. 2015, appendix C, and its authors' code

    Measured on: {num_problems} random linear softmax policies, 16 features of a state,
    4 actions, {_NUM_STATES} states, δ = {_RADIUS:g} nats, λ = {_DAMPING:g}, 10 CG steps
    """
    problems = [_policy_problem(seed) for seed in range(4 if quick else 32)]
    run = compiled(natural_trpo)
    results = [run(weights, batch) for weights, batch in problems]
    found, scales = (np.stack(parts) for parts in zip(*results, strict=True))

    directions, lengths, kls, conditions = [], [], [], []
    for (weights, batch), d, scale in zip(problems, found, scales, strict=True):
        direction, length = trpo_direction(weights, batch)
        halved = [length * direction / 2**power for power in range(11)]
        by_model = [mean_kl(weights, short, batch["states"]) for short in halved]
        accepted = next(kl for kl in by_model if kl <= _RADIUS)
        ours = mean_kl(weights, scale * d, batch["states"])
        kls.append([ours, by_model[0], accepted])
        directions.append(direction)
        lengths.append(length)
        conditions.append(_largest_eigenvalue(weights, batch) / _DAMPING + 1)
    ours, by_model, accepted = np.array(kls).T / _RADIUS
    promised = promise(0.92, 1.0, "steps fill 0.92 to 1 of `max_kl`")
    return Identity(
        algorithm="TRPO",
        ours=natural_trpo,
        textbook=trpo_direction,
        equality=equal(
            "TRPO, its direction",
            found,
            np.stack(directions),
            num_rounded=10 * found[0].size,
            condition=max(conditions),
        ),
        limit=unequal(
            "TRPO, its quadratic length and ours: difference",
            scales,
            np.array(lengths),
            "the KL of the quadratic model is not the KL",
        ),
        others=[
            check("TRPO: smallest KL of our steps, over δ", ours.min(), promised),
            check("TRPO: largest KL of our steps, over δ", ours.max(), promised),
        ],
        text=text_of(
            trpo,
            shortest=by_model.min(),
            longest=by_model.max(),
            least=accepted.min(),
            most=accepted.max(),
            our_least=ours.min(),
            our_most=ours.max(),
            num_problems=len(problems),
        ),
    )


def _policy_problem(seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Weights; states with actions drawn from the policy, and their advantages."""
    random = np.random.default_rng(seed)
    states = random.normal(size=(_NUM_STATES, 16))
    weights = 2 * random.normal(size=(16, 4))
    policy = softmax(states @ weights)
    actions = np.array([random.choice(len(p), p=p) for p in policy])
    return weights, {
        "states": states,
        "actions": actions,
        "log_policy": np.log(policy[np.arange(len(actions)), actions]),
        "advantages": random.normal(size=len(states)) + states[:, 0],
    }


def _largest_eigenvalue(weights: np.ndarray, batch: dict[str, np.ndarray]) -> float:
    """Of the Fisher matrix, by its definition: the mean of Σ π ∇log π ∇log πᵀ."""
    x, policy = batch["states"], softmax(batch["states"] @ weights)
    scores = np.eye(policy.shape[1]) - policy[:, None, :]  # [states, actions, logits]
    gradients = np.einsum("ni,nak->naik", x, np.sqrt(policy)[..., None] * scores)
    rows = gradients.reshape(-1, weights.size) / np.sqrt(len(x))
    return float(np.linalg.norm(rows, 2) ** 2)


def natural_policy_gradient(logits, batch):
    """A table of logits; every state is an example, weighted by its visits."""

    def policy_fn(logits, _batch):
        return logits  # [states, actions]

    def loss_fn(logits, batch):
        return -discounted_return(jax.nn.softmax(logits), batch)

    tx = ngd.natural_gradient(
        _RATE,
        policy_fn,
        ngd.Categorical(),
        damping=0.0,
        solver=ngd.CG(max_steps=100, rtol=1e-13),  # from zero, stays in F's range
        metric=ngd.Metric(weights_fn=lambda batch: batch["visits"]),
    )
    moved, _ = descend(tx, loss_fn, logits, batch)
    return (moved[-1] - logits) / _RATE, moved[-1]


def discounted_return(policy, process):
    """J = ρᵀ (I - γ P_π)⁻¹ r_π."""
    transitions = jnp.einsum("sa,sat->st", policy, process["transitions"])
    rewards = jnp.sum(policy * process["rewards"], axis=1)
    identity = jnp.eye(len(rewards))
    values = jnp.linalg.solve(identity - _DISCOUNT * transitions, rewards)
    return process["start"] @ values


def advantages_and_visits(policy, process):
    """A = Q - V by Bellman's equations, and the discounted visits, which sum to 1."""
    transitions = np.einsum("sa,sat->st", policy, process["transitions"])
    system = np.eye(len(policy)) - _DISCOUNT * transitions
    values = np.linalg.solve(system, np.sum(policy * process["rewards"], axis=1))
    q = process["rewards"] + _DISCOUNT * process["transitions"] @ values
    visits = (1 - _DISCOUNT) * np.linalg.solve(system.T, process["start"])
    return q - values[:, None], visits


def advantage_step(policy, process):
    """A / (1 - γ), and π exp(ηA / (1 - γ)): a soft step of policy iteration."""
    advantages, _ = advantages_and_visits(policy, process)
    weighted = policy * np.exp(_RATE * advantages / (1 - _DISCOUNT))
    # The null space of F: adding a constant to all logits of a state changes nothing,
    # and the pseudo-inverse does not move along it.
    centred = advantages - advantages.mean(axis=1, keepdims=True)
    return centred / (1 - _DISCOUNT), weighted / weighted.sum(axis=1, keepdims=True)


def policy_gradient(quick: bool) -> Identity:
    """On a random Markov decision process: logits, policy, and other weights.

    Condition: A logit for each state and action, states weighted by their discounted
    visits, and no damping; A is centred over the actions, since F⁺ does not move along
    its null space, which does not change the policy. With features instead of a table,
    the result is the best fit to A, not A itself.

    Source: Kakade 2001, theorem 1; Agarwal et al. 2021, soft policy iteration

    Measured on: a random process of {num_states} states and {num_actions} actions, γ =
    {_DISCOUNT:g}, rate η = {_RATE:g}
    """
    num_states, num_actions = (6, 3) if quick else (20, 4)
    random = np.random.default_rng(0)
    logits = random.normal(size=(num_states, num_actions))
    transitions = random.dirichlet(np.ones(num_states), size=logits.shape)
    process = {
        "transitions": transitions,
        "rewards": random.uniform(size=logits.shape),
        "start": random.dirichlet(np.ones(num_states)),
    }
    policy = softmax(logits)
    truth, next_policy = advantage_step(policy, process)
    _, visits = advantages_and_visits(policy, process)
    uniform = np.full(num_states, 1 / num_states)

    run = compiled(natural_policy_gradient)
    found, moved = run(logits, {**process, "visits": visits})
    unweighted, _ = run(logits, {**process, "visits": uniform})
    fisher = visits[:, None, None] * (
        policy[:, :, None] * np.eye(num_actions)
        - policy[:, :, None] * policy[:, None, :]
    )
    eigenvalues = np.linalg.eigvalsh(fisher)[:, 1:]  # without a state's null vector
    condition = eigenvalues.max() / eigenvalues.min()
    condition *= (1 + _DISCOUNT) / (1 - _DISCOUNT)  # of Bellman's equations
    size = {"num_rounded": logits.size, "condition": float(condition)}
    return Identity(
        algorithm="tabular policy gradient",
        ours=natural_policy_gradient,
        textbook=advantage_step,
        equality=equal("tabular policy, F⁺∇J and A/(1-γ)", found, truth, **size),
        limit=unequal(
            "tabular policy, states weighted alike: difference",
            unweighted,
            truth,
            "then A is scaled by the frequency of visits to a state, times the number "
            "of states",
        ),
        others=[
            equal(
                "tabular policy, next policy and π exp(ηA/(1-γ))",
                softmax(np.asarray(moved)),
                next_policy,
                **size,
            ),
            equal(
                "tabular policy, states weighted alike, and theory",
                unweighted,
                truth * visits[:, None] * num_states,
                **size,
            ),
        ],
        text=text_of(policy_gradient, num_states=num_states, num_actions=num_actions),
    )
