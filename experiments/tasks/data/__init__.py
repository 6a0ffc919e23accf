"""Where data comes from: one module for each source, plain NumPy arrays out of it.

Every source says how to install it where it is missing, and holds what it read against
a known checksum. Knows nothing of models or likelihoods.
"""
