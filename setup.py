"""The package and what it needs; `pip install -e '.[test,report]'` for work on it."""

import importlib.util
import pathlib
import re

from setuptools import Extension, find_packages, setup

ROOT = pathlib.Path(__file__).parent


def read_version() -> str:
    """The version in ``bnn_jax/__init__.py``, read without importing the package."""
    text = (ROOT / "bnn_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("bnn_jax/__init__.py: no line '__version__ = \"...\"'")
    return found.group(1)


def read_description() -> str:
    """The README, or nothing where it is absent (a bare copy of the sources)."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


CORE = [
    "jax>=0.10,<0.13",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "tensorflow-datasets>=4.9.10",  # the readers of prepared data only; TensorFlow itself is never needed
    "array_record>=0.8",
    "grain>=0.2.16",
    "ml_collections>=1.1",
    "absl-py>=2.3",
    "rich>=14.0",
    "pillow>=11.0",
    "scikit-learn>=1.6",  # its digits are the data set that is always at hand
    "numpy>=2.0",
    "safetensors>=0.5",  # the container of exported networks
    "flatbuffers>=24",  # what jax.export writes (--mode=export --format=stablehlo)
]

# Loaded with ctypes, so it needs no headers of Python. Without a compiler the rest is installed all the same; inference
# then runs in numpy.
KERNELS = Extension(
    "bnn_jax.deploy._kernels",
    sources=["bnn_jax/deploy/kernels/kernels.c"],
    depends=["bnn_jax/deploy/kernels/kernels.inc", "bnn_jax/deploy/kernels/runtime.h"],
    extra_compile_args=["-std=gnu11", "-O3", "-pthread"],
    extra_link_args=["-pthread", "-lm"],
    optional=True,
)

REPOSITORY = "https://github.com/OWNER/bnn_jax"  # where this project lies; a test names the files that repeat it


def training_kernels() -> list[Extension]:
    """The convolutions of training, where jaxlib's headers of XLA's foreign function interface are at hand."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or not found.submodule_search_locations:
        return []
    return [
        Extension(
            "bnn_jax.ops._convolution",
            sources=["bnn_jax/ops/kernels/convolution.c"],
            depends=["bnn_jax/ops/kernels/convolution.inc", "bnn_jax/ops/kernels/ternary.inc"],
            include_dirs=[f"{found.submodule_search_locations[0]}/include"],
            extra_compile_args=["-std=gnu11", "-O3", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]


setup(
    name="bnn_jax",
    version=read_version(),
    description="Binary and low-bit neural networks in JAX and Flax",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url=REPOSITORY,
    python_requires=">=3.11",
    packages=find_packages(include=["bnn_jax", "bnn_jax.*"]),
    package_data={"bnn_jax.deploy": ["kernels/*"], "bnn_jax.ops": ["kernels/*"]},
    ext_modules=[KERNELS, *training_kernels()],
    install_requires=CORE,
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10,<0.13"],
        "fast": ["opencv-python-headless>=4.10"],  # config.data.decoder='opencv'
        "augment": ["dm-pix>=0.4.3"],  # config.data.color_jitter
        "tensorboard": ["tensorboardX>=2.6"],  # config.log.tensorboard
        "wandb": ["wandb>=0.18"],  # config.log.wandb
        "test": ["pytest>=8.0", "pytest-xdist>=3.6", "pyyaml>=6.0", "tensorboardX>=2.6", "dm-pix>=0.4.3"],
        "report": ["matplotlib>=3.9"],
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=1.0",
            "l2m4m>=1.0.4",  # formulas as MathML
        ],
        "onnx": ["onnx>=1.16"],  # --mode=export --format=onnx
        "dev": ["ruff>=0.17,<0.18", "pyright[nodejs]>=1.1.408", "pre-commit>=4.0"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
