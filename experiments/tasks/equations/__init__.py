"""Physics-informed networks: the residuals of equations are the outputs of a model.

    u_θ -> residual blocks r_b, each on its own points,    loss = Σ_b w_b mean |r_b|²

With a `Product` of `Gaussian`s as likelihood, the Fisher is the Gauss-Newton matrix of
that loss, and natural gradient descent is known as energy natural gradient.

* `settings`: the settings of a configuration;
* `derivatives`: networks with their first and second derivatives in one pass;
* `problem`: what a problem is, its points, and forms such as periodic features;
* `points`, `weights`: points that follow the residual, weights that respect causality;
* `regions`: points in and around disks, polygons, their unions and differences;
* `unknowns`: coefficients of an equation that are found from data;
* `problems`, `solutions`: equations, domains, exact solutions;
* `learner`: the learner for the loop of `experiments.train`;
* `pictures`: solution, error and residual;
* `peers`, `table`: other methods, compared at equal CPU time.
"""
