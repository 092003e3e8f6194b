"""The compiled kernels, instruction set by instruction set, against numpy."""

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from bnn_jax.deploy import fuse, native, reference
from bnn_jax.deploy.graph import Codes, Node, Program
from bnn_jax.deploy.memory import Layers
from bnn_jax.deploy.plan import Plan
from bnn_jax.deploy.weights import FloatWeights, LevelWeights, PatternWeights, Weights
from bnn_jax.errors import UserError

NAMES = ("avx512", "wide", "avx2", "plain")


@pytest.fixture(scope="session")
def wide_library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The library with the kernels of 64 bytes that need no instructions of their own."""
    return compiled(tmp_path_factory.mktemp("wide") / "kernels.so", "-O1", "-DWIDE")


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest, wide_library: Path | None) -> native.Kernels:
    found = {each.name: each for each in native.instruction_sets()}
    if wide_library is not None:
        found.update({each.name: each for each in native.instruction_sets(wide_library) if each.name == "wide"})
    if request.param not in found:
        pytest.skip(f"this machine (or its compiler) has no {request.param}")
    return found[request.param]


def compiled(path: Path, *options: str) -> Path | None:
    """The kernels compiled with further options, or None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = Path(native.__file__).parent / "kernels" / "kernels.c"
    flags = ("-std=gnu11", "-fPIC", "-shared", "-pthread", *options)
    subprocess.run([compiler, *flags, str(source), "-o", str(path), "-lm"], check=True, timeout=300)
    return path


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def binary(shape: tuple[int, ...], seed: int = 1) -> LevelWeights:
    indices = random(seed).integers(0, 2, shape).astype(np.uint16)
    scale = random(seed).uniform(0.5, 2, shape[-1]).astype(np.float32)
    return LevelWeights(indices, np.array([-1, 1], np.float32), scale, 1)


def integers(shape: tuple[int, ...], highest: int) -> LevelWeights:
    levels = np.arange(-highest, highest + 1, dtype=np.float32)
    return LevelWeights(random().integers(0, len(levels), shape).astype(np.uint16), levels, np.float32(0.5), 8)


def patterns(num_in: int, num_out: int, tau: int) -> PatternWeights:
    levels = np.where(random().random((2**tau, 9)) < 0.5, -1, 1).astype(np.float32)
    indices = random(1).integers(0, 2**tau, (num_in, num_out)).astype(np.uint16)
    return PatternWeights(indices, levels, np.ones(num_out, np.float32), all_patterns=False)


def conv(codes: Codes | None, *, strides=(1, 1), padding=((1, 1), (1, 1)), groups=1) -> Node:
    options: dict[str, Any] = {"layer": "layer", "strides": strides, "padding": padding, "groups": groups}
    return Node("conv", (1,), options | ({} if codes is None else {"codes": codes}))


@dataclasses.dataclass
class Case:
    """A quantizer in front, a product, and what it is expected to be."""

    product: str
    layer: Weights
    node: Node
    before: tuple[Node, ...]
    size: tuple[int, int] = (7, 9)
    channels: int = 3


SIGN = (Node("sign", (0,)),)
UNIT = Codes(1.0, -1, 1)


def levels_node(scale: float, low: int, high: int) -> tuple[Node, ...]:
    """Rounds to codes times a scale."""
    return (
        Node("divide", (0,), {"by": np.float32(scale)}),
        Node("clip", (1,), {"low": np.float32(low), "high": np.float32(high)}),
        Node("round", (2,)),
        Node("affine", (3,), {"scale": np.float32(scale)}),
    )


CASES = {
    **{
        f"binary {num_in}x{num_out}": Case("binary", binary((3, 3, num_in, num_out)), conv(UNIT), SIGN, channels=num_in)
        for num_in, num_out in ((1, 1), (3, 5), (16, 16), (17, 31), (32, 9), (64, 32), (65, 33), (130, 80), (33, 130))
    },
    "binary 1x1, stride 2": Case(
        "binary", binary((1, 1, 20, 40)), conv(UNIT, strides=(2, 2), padding=((0, 0), (0, 0))), SIGN, channels=20
    ),
    "binary 3x3, stride 2, uneven padding": Case(
        "binary", binary((3, 3, 20, 70)), conv(UNIT, strides=(2, 3), padding=((0, 2), (2, 1))), SIGN, channels=20
    ),
    "binary 3x7, stride 2": Case("binary", binary((3, 7, 16, 9)), conv(UNIT, strides=(1, 2)), SIGN, channels=16),
    "binary 5x2": Case("binary", binary((5, 2, 9, 12)), conv(UNIT, padding=((4, 4), (0, 0))), SIGN, channels=9),
    **{
        f"codebook tau {tau}, {num_in}x{num_out}, {size}": Case(
            "codebook", patterns(num_in, num_out, tau), conv(UNIT), SIGN, size=size, channels=num_in
        )
        for tau, num_in, num_out, size in (
            (1, 3, 8, (1, 1)),
            (2, 14, 20, (5, 20)),
            (4, 30, 64, (14, 14)),
            (4, 64, 70, (3, 70)),
            (5, 13, 128, (7, 7)),
        )
    },
    "bytes, 2 bit": Case(
        "bytes", integers((3, 3, 6, 10), 3), conv(Codes(0.25, 0, 3)), levels_node(0.25, 0, 3), channels=6
    ),
    "bytes, 4 bit": Case(
        "bytes", integers((3, 3, 70, 40), 15), conv(Codes(0.1, 0, 15)), levels_node(0.1, 0, 15), channels=70
    ),
    "bytes, signs": Case("bytes", integers((3, 3, 5, 9), 7), conv(UNIT), SIGN, channels=5),
    "shorts, 8 bit": Case(
        "shorts", integers((3, 3, 9, 17), 255), conv(Codes(0.01, 0, 255)), levels_node(0.01, 0, 255), channels=9
    ),
    "shorts, signed": Case(
        "shorts", integers((1, 3, 7, 5), 200), conv(Codes(0.1, -100, 100)), levels_node(0.1, -100, 100), channels=7
    ),
    "float": Case(
        "float", FloatWeights(random().normal(size=(3, 3, 5, 37)).astype(np.float32)), conv(None), SIGN, channels=5
    ),
    "float 7x7, stride 2": Case(
        "float",
        FloatWeights(random().normal(size=(7, 7, 3, 64)).astype(np.float32)),
        conv(None, strides=(2, 2), padding=((3, 3), (3, 3))),
        SIGN,
        size=(23, 21),
    ),
    "float, two groups": Case(
        "float",
        FloatWeights(random().normal(size=(3, 3, 4, 6)).astype(np.float32)),
        conv(None, groups=2),
        SIGN,
        channels=8,
    ),
    "depthwise": Case(
        "depthwise",
        FloatWeights(random().normal(size=(3, 3, 1, 21)).astype(np.float32)),
        conv(None, groups=21, strides=(2, 1)),
        SIGN,
        channels=21,
    ),
    "dense": Case("binary", binary((50, 30)), Node("dense", (1,), {"layer": "layer", "codes": UNIT}), SIGN),
}


@pytest.mark.parametrize("name", CASES)
def test_a_product(name: str, kernels: native.Kernels) -> None:
    case = CASES[name]
    # Codebooks everywhere, whether it pays or not.
    with mock.patch.dict(fuse.LEAST_FILTERS, dict.fromkeys(NAMES, 0)):
        _check_product(case, kernels)


def _check_product(case: "Case", kernels: native.Kernels) -> None:
    shape = (1, 1, 50) if case.node.kind == "dense" else (*case.size, case.channels)
    nodes = list(case.before)
    if case.node.kind == "dense":
        nodes.append(Node("reshape", (len(nodes),), {"shape": (50,)}))
    nodes.append(dataclasses.replace(case.node, inputs=(len(nodes),)))
    if case.node.kind == "conv":
        nodes.append(Node("sum", (len(nodes),)))
        # A sum over positions hides their order: weigh them by a second, positional output.
        nodes[-1] = Node(
            "reshape", (len(nodes) - 1,), {"shape": (int(np.prod(_conv_shape(nodes, shape, case.layer))),)}
        )
    program, weights = Program(shape, tuple(nodes)), {"layer": case.layer}
    _compare(program, weights, kernels, case.product)


def _conv_shape(nodes: list[Node], shape: tuple[int, int, int], layer: Weights) -> tuple[int, ...]:
    return Program(shape, tuple(nodes[:-1])).shapes({"layer": layer.shape})[-1]


def _compare(
    program: Program, weights: dict[str, Weights], kernels: native.Kernels, product: str | None = None
) -> None:
    """One image, several at once, and several threads."""
    layers = Layers(program, weights, kernels)
    chosen = next(iter(layers.products.values()), None)
    assert product in (None, chosen)
    images = random(7).normal(0, 2, (3, *program.image_shape)).astype(np.float32)
    images[0, 0] = 0
    expected = reference.run(program, weights, images)
    tolerance = 0 if chosen in ("binary", "codebook") else 1e-5 * np.abs(expected).max()
    for batch, threads in ((1, 1), (3, 1), (3, 2), (1, 3)):
        plan = Plan(program, layers, batch=batch)
        for repeat in range(2):
            found = np.concatenate([plan.run(images[i : i + batch], threads) for i in range(0, 3, batch)])
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=f"{batch} {threads} {repeat}")


FOLLOWERS = {
    "affine": Node("affine", (0,), {"scale": np.float32([2, -1, 0.5]), "offset": np.float32([0, 1, 2])}),
    "scale": Node("affine", (0,), {"scale": np.float32(3)}),
    "divide": Node("divide", (0,), {"by": np.float32([3, -7, 0.1])}),
    "clip": Node("clip", (0,), {"low": np.float32(-0.5), "high": np.float32(1)}),
    "relu": Node("clip", (0,), {"low": np.float32(0)}),
    "prelu": Node("prelu", (0,), {"slope": np.float32([0.25, -1, 2])}),
    "round": Node("round", (0,)),
    "round_away": Node("round_away", (0,)),
    "sign": Node("sign", (0,)),
    "threshold": Node("threshold", (0,), {"at": np.float32([0, 1, 2]), "below": np.float32([-1, 0.5, 2])}),
    "turned": Node("threshold", (0,), {"at": np.float32(1), "below": np.float32(0), "sign": np.float32([1, -1, 1])}),
    "floor": Node("floor", (0,)),
    "multiply": Node("multiply", (0, 0)),
    "twice": Node("add", (0, 0)),
    "max_pool": Node("max_pool", (0,), {"window": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}),
    "sum_pool": Node("sum_pool", (0,), {"window": (2, 3), "strides": (2, 1), "padding": ((0, 0), (0, 1))}),
    "sum": Node("sum", (0,)),
    "slice": Node("slice", (0,), {"start": (1, 0, 0), "stop": (6, 8, 3), "step": (2, 3, 1)}),
    "some channels": Node("slice", (0,), {"start": (0, 0, 1), "stop": (6, 8, 3), "step": (1, 1, 1)}),
    "pad": Node("pad", (0,), {"low": (0, 0, 2), "high": (0, 0, 3)}),
    "pad around": Node("pad", (0,), {"low": (1, 0, 0), "high": (0, 2, 0)}),
    "transpose": Node("transpose", (0,), {"axes": (2, 0, 1)}),
    "concatenate": Node("concatenate", (0, 0)),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_an_operation_of_the_format(name: str, kernels: native.Kernels) -> None:
    first = Program((6, 8, 3), (FOLLOWERS[name],))
    size = int(np.prod(first.shapes({})[-1]))
    nodes = (FOLLOWERS[name], Node("reshape", (1,), {"shape": (size,)}))
    _compare(Program((6, 8, 3), nodes), {}, kernels)


def test_a_value_that_is_read_in_several_forms(kernels: native.Kernels) -> None:
    # A sign is stored for two convolutions, as it is for a sum; the last add waits for the later branch.
    nodes = (
        Node("sign", (0,)),
        Node("conv", (1,), conv(UNIT).options | {"layer": "a"}),
        Node("conv", (1,), conv(UNIT, padding=((0, 0), (0, 0))).options | {"layer": "b"}),
        Node("add", (2, 3)),
        Node("add", (4, 1)),
        Node("reshape", (5,), {"shape": (5 * 6 * 8,)}),
    )
    _compare(Program((5, 6, 8), nodes), {"a": binary((3, 3, 8, 8)), "b": binary((1, 1, 8, 8))}, kernels)


def test_what_waits_for_a_later_branch_follows_it() -> None:
    nodes = (
        Node("sign", (0,)),
        Node("conv", (1,), conv(UNIT).options | {"layer": "a"}),
        Node("affine", (2,), {"offset": np.float32(1)}),
        Node("conv", (1,), conv(UNIT).options | {"layer": "b"}),
        Node("add", (3, 4)),
    )
    program = Program((5, 6, 8), nodes)
    shapes = program.shapes({"a": (3, 3, 8, 8), "b": (3, 3, 8, 8)})
    assert [group.nodes for group in fuse.fuse(program, shapes)] == [(0,), (1, 2), (3, 4)]


def test_the_largest_sums_are_exact(kernels: native.Kernels) -> None:
    # All products have the same sign: every sum takes the largest value that the format of sums has to hold.
    size = 4 * fuse.MOST_FOURS - 4
    layer = LevelWeights(np.ones((size, 9), np.uint16), np.array([-1, 1], np.float32), np.float32(1), 1)
    nodes = (
        Node("reshape", (0,), {"shape": (size,)}),
        Node("sign", (1,)),
        Node("dense", (2,), {"layer": "layer", "codes": UNIT}),
    )
    program = Program((1, 1, size), nodes)
    for sign in (-1.0, 1.0):
        found = Plan(program, Layers(program, {"layer": layer}, kernels), batch=1)
        assert np.all(found.run(np.full((1, 1, 1, size), sign, np.float32)) == sign * size)


def test_the_structures_have_the_sizes_the_library_says() -> None:
    library = ctypes.CDLL(str(native.kernel_library()))
    assert [library.bnn_size(i) for i in range(3)] == [
        ctypes.sizeof(each) for each in (native.COperation, native.CStep, native.CInstructionSet)
    ]


def test_a_set_that_the_machine_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"instruction_set='mmx': accepted on this machine are .*plain, numpy"):
        native.choose("mmx")
    monkeypatch.setenv(native.VARIABLE, "sse9")
    with pytest.raises(UserError, match="BNN_JAX_INSTRUCTION_SET=sse9: accepted"):
        native.choose()
    monkeypatch.setenv(native.VARIABLE, "plain")
    chosen = native.choose()
    assert chosen is not None and chosen.name == "plain"


def test_without_a_library_one_line_says_that_numpy_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "kernel_library", lambda: None)
    with pytest.warns(UserWarning, match="were not compiled at installation; numpy is used, which is slow"):
        assert native.choose() is None
    wrong = tmp_path / "_kernels.so"
    wrong.write_bytes(b"no library")
    monkeypatch.setattr(native, "kernel_library", lambda: wrong)
    with pytest.warns(UserWarning, match="compiled kernels: .*numpy is used"):
        assert native.choose() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.choose("numpy") is None


@pytest.mark.slow
def test_the_kernels_under_sanitizers(tmp_path: Path) -> None:
    """All cases of this file once more, in a process with AddressSanitizer and UndefinedBehaviorSanitizer."""
    library = compiled(
        tmp_path / "kernels.so", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    )
    if library is None:
        pytest.skip("no compiler")
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("no library of AddressSanitizer")
    program = (
        "import pathlib, sys\n"
        "from bnn_jax.deploy import native\n"
        "from tests.deploy import kernels_test as t\n"
        "for kernels in native.instruction_sets(pathlib.Path(sys.argv[1])):\n"
        "    for name in t.CASES: t.test_a_product(name, kernels)\n"
        "    for name in t.FOLLOWERS: t.test_an_operation_of_the_format(name, kernels)\n"
        "    t.test_a_value_that_is_read_in_several_forms(kernels)\n"
        "    t.test_the_largest_sums_are_exact(kernels)\n"
        "print('finished')"
    )
    # Python itself leaves memory to the end of the process.
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    finished = subprocess.run(
        [sys.executable, "-c", program, str(library)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0 and finished.stdout.split()[-1] == "finished", finished.stderr[-3000:]
