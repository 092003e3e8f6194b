"""Writes the network of a stage as a file of operations and packed weights."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

import bnn_jax
from bnn_jax.deploy.artefact import Artefact, load, save
from bnn_jax.deploy.restart import modules_of
from bnn_jax.deploy.trace import trace
from bnn_jax.errors import UserError
from bnn_jax.quantizers.base import QuantContext


def export(
    path: Path,
    network: nn.Module,
    variables: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    *,
    facts: Mapping[str, Any],
    context: QuantContext | None = None,
) -> Artefact:
    """Exports a network, and reads back what was written.

    Args:
      path: file to write.
      network: (images, QuantContext) -> NetworkOutput.
      variables: its variables; latent weights are not stored.
      image_shape: (H, W, C) of its images.
      facts: plain values that the file is to say of the network, see ``artefact``.
      context: context of the evaluation; None: that of the variables, without a choice of branches.

    Raises:
      UserError: the network does something files do not have, or the file cannot be written.
    """
    try:
        program, weights = trace(network, variables, image_shape, context)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None
    try:
        save(path, program, weights, {**facts, **modules_of(program), "bnn_jax": bnn_jax.__version__, **_commit()})
    except OSError as error:
        raise UserError(f"--output={path}: {os.strerror(error.errno or 0)}") from None
    return load(path)


def _commit() -> dict[str, str]:
    """The commit of the working tree that the package lies in, if it lies in one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": found.stdout.strip()} if found.returncode == 0 else {}
