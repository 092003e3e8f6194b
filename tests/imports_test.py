"""Imports point one way: a module imports from its own package or from a layer below, never from one above or beside.

The source is parsed, not run, so imports inside functions count too.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Layer of every module or package directly below bnn_jax; higher may import lower. A new one has to be given its place.
LAYERS = {
    "errors": 0,
    "stages": 0,
    "knobs": 0,
    "catalogue": 0,
    "keys": 1,
    "files": 1,
    "hosts": 1,
    "picture_files": 1,
    "restricted_pickle": 1,
    "run_files": 1,
    "schedules": 1,
    "ops": 1,
    "array_files": 2,
    "quantizers": 2,
    "layers": 3,
    "networks": 4,
    "objectives": 4,
    "data": 4,
    "storage": 5,
    "training": 6,
    "search": 7,
    "report": 7,
    "methods": 7,
    "deploy": 7,
    "experiment": 8,
    "command_line": 9,
}
# What a package may import of the library, where that is less than everything below it.
ONLY = {
    "errors": set(),
    "stages": set(),
    "knobs": set(),
    "catalogue": set(),
    "keys": {"errors"},
    "files": set(),
    "hosts": {"errors"},
    "run_files": {"errors"},
    "array_files": {"errors", "restricted_pickle", "run_files"},
    "picture_files": set(),
    "schedules": {"stages"},
    "ops": set(),
    "methods": {"stages", "errors", "keys", "knobs", "catalogue"},
    "data": {"stages", "errors", "files", "picture_files", "restricted_pickle"},
    "search": {"errors"},
}
# What it may import from elsewhere besides the standard library, where that is restricted.
OUTSIDE = {
    "errors": set(),
    "stages": set(),
    "knobs": set(),
    "catalogue": set(),
    "keys": set(),
    "files": set(),
    "hosts": {"jax", "numpy"},
    "restricted_pickle": {"numpy"},
    "array_files": {"numpy"},
    "run_files": set(),
    "picture_files": {"PIL", "numpy"},
    "schedules": {"jax"},
    "ops": {"jax"},
    "methods": {"ml_collections"},
    "search": {"numpy"},
}
# Never needed at run time.
FORBIDDEN = {"tensorflow", "torch", "tests", "configs"}

PACKAGE = ROOT / "bnn_jax"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def part_of(path: pathlib.Path) -> str:
    """The module or package directly below bnn_jax a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(source: str, package: list[str]) -> set[str]:
    """Full dotted names a module imports; ``package`` is what its relative imports start from."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def violations(part: str, names: set[str]) -> list[str]:
    """What a file of ``part`` imports against the rules."""
    found = []
    for name in sorted(names):
        top, *rest = name.split(".")
        if top == "bnn_jax":
            target = rest[0] if rest and rest[0] in LAYERS else None
            # 'from bnn_jax import __version__' names no part.
            if target is None or target == part:
                continue
            if LAYERS[target] >= LAYERS[part] or target not in ONLY.get(part, LAYERS):
                found.append(f"{part} imports {name}")
        elif top in FORBIDDEN or (part in OUTSIDE and top not in OUTSIDE[part] and top not in sys.stdlib_module_names):
            found.append(f"{part} imports {name}")
    return found


def test_every_part_of_the_package_has_its_layer() -> None:
    unknown = {part_of(path) for path in MODULES} - set(LAYERS)
    assert not unknown, f"bnn_jax/{sorted(unknown)}: give it a layer in LAYERS of {__file__}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: pathlib.Path) -> None:
    package = ["bnn_jax", *path.relative_to(PACKAGE).parts[:-1]]
    assert violations(part_of(path), imported_names(path.read_text(), package)) == []


def module_name(path: pathlib.Path) -> str:
    """'bnn_jax.data.order' of a file; a package has the name of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {module_name(path): path for path in MODULES}

    def imported(name: str) -> set[str]:
        path = names[name]
        source = path.read_text()
        if path.name == "__init__.py":
            # A package whose functions are those of its modules imports them when they are called.
            own = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
            source = ast.unparse(ast.Module(own, []))
        found = imported_names(source, list(path.relative_to(ROOT).parts[:-1]))
        # 'from bnn_jax.data import order' names a module, 'from bnn_jax.data.order import permutation' what is in one.
        return {module for text in found for module in (text, text.rpartition(".")[0]) if module in names} - {name}

    left = {name: imported(name) for name in names}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"each of these needs another of them: {sorted(left)}"


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("ops", "from bnn_jax.quantizers import base"),
        ("ops", "import flax.linen as nn"),
        ("objectives", "from bnn_jax import networks"),
        ("networks", "def f():\n    from bnn_jax.objectives import build"),
        ("data", "from bnn_jax.training.state import TrainState"),
        ("methods", "import jax.numpy as jnp"),
        ("networks", "from bnn_jax.methods import METHODS"),
        ("training", "from ..experiment import train"),
        ("report", "import tensorflow as tf"),
    ],
)
def test_a_wrong_import_is_found(part: str, source: str) -> None:
    assert violations(part, imported_names(source, ["bnn_jax", part]))


def test_relative_imports_inside_a_package_are_allowed() -> None:
    assert violations("training", imported_names("from .state import TrainState", ["bnn_jax", "training"])) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_configs_are_plain_values_and_take_of_the_library_the_definitions_of_keys_alone(path: pathlib.Path) -> None:
    names = imported_names(path.read_text(), ["configs"])
    assert {name for name in names if name.startswith("bnn_jax")} <= {"bnn_jax.experiment.config.defaults"}
    tops = {name.split(".")[0] for name in names}
    assert tops - sys.stdlib_module_names <= {"bnn_jax", "configs", "ml_collections"}


def test_a_config_and_the_help_on_its_keys_come_without_jax() -> None:
    code = "import sys, launch, configs.common; launch.main(['launch.py', '--help-config']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "ml_collections" in imported
    assert not imported & {"jax", "flax", "optax", "orbax", "tensorflow_datasets", "numpy", "matplotlib"}


def test_launch_imports_nothing_heavy_before_it_has_read_the_flags() -> None:
    # Importing jax, flax, orbax and tfds takes seconds; ``--help`` has to be quick.
    top_level = [
        node
        for node in ast.parse((ROOT / "launch.py").read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    tops = {name.split(".")[0] for node in top_level for name in imported_names(ast.unparse(node), [])}
    assert tops - sys.stdlib_module_names <= {"absl"}
