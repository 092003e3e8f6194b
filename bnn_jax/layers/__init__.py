"""Layers: quantized convolution and dense layers, batch normalisation, shortcuts, activations."""

from bnn_jax.layers.conv import QuantConv, QuantDense
from bnn_jax.layers.norm import BatchNorm

__all__ = ["BatchNorm", "QuantConv", "QuantDense"]
