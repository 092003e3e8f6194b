"""bnn_jax: binary and low-bit networks in JAX and Flax.

Reading order: ``stages`` (what a training run is, as data), ``methods`` (a config becomes stages), ``experiment``
(stages run one after another), ``training`` (one step, one loop, one checkpoint format), ``networks``, ``layers``,
``quantizers``, ``ops`` (from the whole network down to a single rounding).
"""

__version__ = "0.1.0"
