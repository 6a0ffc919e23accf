"""Physics-informed networks: equations as residuals, residuals as a model's outputs.

    u_θ -> residual blocks r_b on points of their own,    loss = Σ_b w_b mean |r_b|²

With `Product` of `Gaussian`s as likelihood the Fisher is the Gauss-Newton matrix of
that loss, and natural gradient descent is what is called energy natural gradient.

* `settings`: what a configuration may say;
* `derivatives`: networks with their first and second derivatives in one pass;
* `problems`: equations, domains, points, exact solutions;
* `learner`: the same as the loop of `experiments.train` sees it;
* `pictures`: solution, error and residual;
* `peers`, `table`: what others do, on one clock.
"""
