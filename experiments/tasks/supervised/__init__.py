"""Tasks that consist of a data set, a network and a loss, and their training."""
