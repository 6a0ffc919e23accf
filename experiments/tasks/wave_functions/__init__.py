"""Ground states of spin chains by variational Monte Carlo: the task `vmc`."""
