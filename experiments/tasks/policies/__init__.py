"""Policies that learn by reinforcement: trust regions, and their peer on clipped steps.

    rollout -> advantages -> policy update -> value fit        many times, in one scan

* `settings`: what a configuration may say;
* `environments`, `rollouts`: gymnax, and a policy acting in many copies of it;
* `advantages`: generalised advantage estimation;
* `observations`: what the networks see of them, by running statistics;
* `networks`: the policy and the value function;
* `updates`, `values`: one step of each;
* `training`: all of it, compiled, for one agent or for many at once;
* `evaluation`, `pictures`: how good it has become, and what it looks like;
* `export`: the policy as a file of its own;
* `learner`: the same as the loop of `experiments.train` sees it.
"""
