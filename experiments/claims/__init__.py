"""Claims about the natural gradient, each tested by an experiment of its own."""
