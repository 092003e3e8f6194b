"""Convolution in float32 by kernels of our own, for training and evaluation on a CPU, where XLA's take longer.

The kernels (``kernels/``) are compiled when the package is installed and called through XLA's foreign function
interface. Where there was no compiler, nothing here is used.
"""

import ctypes
import functools
import itertools
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]

_TARGETS = ("bnn_convolution", "bnn_convolution_input_gradient", "bnn_convolution_kernel_gradient")
FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT = _TARGETS
BEST = -1  # the instruction set is chosen when the program runs


@functools.cache
def instruction_sets() -> dict[str, int]:
    """Names and numbers of the instruction sets that this machine can run, best first; none without a library."""
    found = sorted(Path(__file__).parent.glob("_convolution*.so"))
    if not found:
        return {}
    try:
        library = ctypes.CDLL(str(found[0]))
        for target in _TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except (OSError, AttributeError) as error:
        warnings.warn(f"compiled convolutions: {error}; XLA's are used, which are slower", stacklevel=2)
        return {}
    library.bnn_convolution_set.restype = ctypes.c_char_p
    library.bnn_convolution_set.argtypes = [ctypes.c_int64]
    names = itertools.takewhile(lambda name: name is not None, map(library.bnn_convolution_set, itertools.count()))
    return {name.decode(): number for number, name in enumerate(names) if name}


def choice(cpu_kernels: str) -> str:
    """What convolves in a program that is built now: the name of an instruction set of the kernels here, or 'xla'.

    Args:
      cpu_kernels: 'auto': the kernels where they can be used; 'xla': XLA's convolutions.
    """
    # Of several devices each has a part of an array; XLA cannot divide a call that it does not know.
    if cpu_kernels == "xla" or jax.default_backend() != "cpu" or jax.device_count() > 1:
        return "xla"
    return next(iter(instruction_sets()), "xla")


def is_supported(x: jax.Array, kernel: jax.Array, padding: Padding, groups: int) -> bool:
    """Whether the kernels here know such a convolution."""
    return (
        groups == 1
        and x.dtype == kernel.dtype == jnp.float32
        and all(pad >= 0 for pads in padding for pad in pads)
        and 0 not in (*x.shape, *kernel.shape, *_output_shape(x, kernel, (1, 1), padding))
    )


def _output_shape(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> tuple[int, ...]:
    rows, columns = (
        (x.shape[1 + axis] + sum(padding[axis]) - kernel.shape[axis]) // strides[axis] + 1 for axis in (0, 1)
    )
    return (x.shape[0], max(rows, 0), max(columns, 0), kernel.shape[3])


def _call(target: str, shape: tuple[int, ...], operands: tuple, strides: Pair, padding: Padding, number: int):
    if not instruction_sets():
        raise ValueError("convolution: the kernels were not compiled at installation")
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    # In the order of their names, as the call reads them.
    window = {"instruction_set": number, "pad_left": padding[1][0], "pad_top": padding[0][0]}
    return call(*operands, **window, stride_x=strides[1], stride_y=strides[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolution(
    x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, instruction_set: int = BEST
) -> jax.Array:
    """Convolution, to be called where ``choice`` and ``is_supported`` say so.

    Forward: ``y[n, h, w, o] = sum_ijc x_padded[n, s*h + i, s*w + j, c] * kernel[i, j, c, o]``.
    Backward: that of the convolution. Sums are added in an order that follows from the shapes alone, whatever the
      number of threads.

    Args:
      x: (N, H, W, I), float32.
      kernel: (kh, kw, I, O), float32.
      strides: (vertical, horizontal).
      padding: ((top, bottom), (left, right)), zeros, not negative.
      instruction_set: a number of ``instruction_sets``, or the best one.

    Returns:
      (N, H', W', O), float32.

    Raises:
      ValueError: there are no kernels.
    """
    return _call(FORWARD, _output_shape(x, kernel, strides, padding), (x, kernel), strides, padding, instruction_set)


def _forward(x: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding, instruction_set: int):
    return convolution(x, kernel, strides, padding, instruction_set), (x, kernel)


def _backward(strides: Pair, padding: Padding, instruction_set: int, residuals: tuple, cotangent: jax.Array):
    x, kernel = residuals
    return (
        _call(INPUT_GRADIENT, x.shape, (cotangent, kernel), strides, padding, instruction_set),
        _call(KERNEL_GRADIENT, kernel.shape, (x, cotangent), strides, padding, instruction_set),
    )


convolution.defvjp(_forward, _backward)
