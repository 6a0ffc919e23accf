"""Where data comes from: one module per source, each returning plain NumPy arrays.

If its data is missing, a source says how to install it; what it reads is checked
against a known checksum. Knows nothing of models or likelihoods.
"""
