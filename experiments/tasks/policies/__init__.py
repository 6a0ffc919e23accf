"""Policies trained by reinforcement learning: trust regions, and PPO as their peer.

    rollout -> advantages -> policy update -> value fit        repeated, in one scan

* `settings`: the settings of a configuration;
* `environments`, `rollouts`: gymnax, and a policy acting in many copies of it;
* `advantages`: generalised advantage estimation;
* `observations`: normalises what the networks see by running statistics;
* `networks`: the policy and the value function;
* `updates`, `values`: one step of each;
* `training`: everything together, compiled, for one agent or for many at once;
* `evaluation`, `pictures`: how good the policy has become, and what it looks like;
* `export`: saves the policy as a single file;
* `learner`: the learner for the loop of `experiments.train`.
"""
