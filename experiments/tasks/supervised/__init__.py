"""Tasks that are a data set, a network and a loss, and what trains them."""
