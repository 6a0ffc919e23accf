"""What is said of the natural gradient, each claim by an experiment of its own."""
