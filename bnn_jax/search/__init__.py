"""Search over the branches of a supernet: NumPy only, no network and no jax."""
