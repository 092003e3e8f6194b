"""What a run reads: images, variables that a stage has saved, checkpoints and released files."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bnn_jax import data, hosts
from bnn_jax.data.memory import ImageSource, Normalization
from bnn_jax.deploy import artefact, restart
from bnn_jax.deploy.jobs import is_exported
from bnn_jax.errors import CheckpointError, UserError
from bnn_jax.experiment import adapt, start
from bnn_jax.experiment.build import Experiment, build_network
from bnn_jax.experiment.folder import RunFolder
from bnn_jax.stages import DataSpec, Stage, parse_reference
from bnn_jax.storage.checkpoint import CheckpointStore, describe
from bnn_jax.storage.content_hash import VARIABLES, Header
from bnn_jax.storage.fitting import networks_that_fit
from bnn_jax.storage.orbax_files import Damage
from bnn_jax.storage.other_files import import_file, read_arrays
from bnn_jax.storage.pytorch import Misfit
from bnn_jax.training.loop import Setup
from bnn_jax.training.seeds import Seeds


def load_images(config: Mapping[str, Any], spec: DataSpec, normalization: Normalization | None = None) -> ImageSource:
    """The images of a stage, as the config says where they lie; of a folder's pictures normalised as is known."""
    where = {"data_dir": config["data"]["data_dir"], "seed": config["seed"], "progress": hosts.is_first()}
    return data.build(spec, **where, normalization=normalization)


def normalization_of(experiment: Experiment, folder: RunFolder, stage: Stage) -> Normalization | None:
    """How a stage's training normalises the pictures of a folder; None before it begins, and for other data sets.

    Raises:
      UserError: the folder has other classes by now.
    """
    known = folder.images(stage.name)
    if known is None:
        return None
    now = list(data.class_names(stage.data, data_dir=experiment.config["data"]["data_dir"]))
    if now != known["classes"]:
        before, after = (f"{len(names)} classes, {names[0]} to {names[-1]}" for names in (known["classes"], now))
        where = folder.stage(stage.name)
        raise UserError(f"{where} was trained on {before}: config.data.data_dir now has {after}")
    return Normalization(tuple(known["mean"]), tuple(known["std"]))


class SavedVariables:
    """Resolves references to saved variables: 'stage:NAME', 'stage:NAME@best' and 'file:PATH'.

    Args:
      experiment: whose stages references name.
      folder: where those stages have saved their variables.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder):
        self._experiment, self._folder = experiment, folder

    def load(self, reference: str, target: dict[str, Any], seeds: Seeds) -> dict[str, Any]:
        """Variables a reference points to.

        Args:
          reference: 'stage:NAME', 'stage:NAME@best' or 'file:PATH'.
          target: shapes of the variables of one seed.
          seeds: those whose variables a stage has saved; a file has those of one.

        Raises:
          CheckpointError: nothing is saved there, it is damaged, or it is of another network.
        """
        parsed = parse_reference(reference)
        if parsed.kind == "file":
            shape, _ = self._experiment.describe(self._experiment.stages[-1])
            return load_checkpoint(Path(parsed.target), target, image_shape=shape)
        with CheckpointStore(self._folder.checkpoints(parsed.target), read_only=True) as store:
            return store.restore(seeds.shapes(target), which=parsed.which)[0]

    def with_network(
        self, reference: str, *, source: ImageSource, default: Stage, seeds: Seeds
    ) -> tuple[Any, dict[str, Any]]:
        """Network and variables a reference points to; a file holds variables of ``default``'s network."""
        experiment = self._experiment
        behind = experiment.stage_behind(reference, default)
        network = build_network(behind, source.num_classes, cpu_kernels=experiment.cpu_kernels)
        return network, self.load(reference, start.variable_shapes(network, source.image_shape), seeds)

    def inherited_by(self, setup: Setup) -> start.Inherited | None:
        """What a stage starts from; None where it starts afresh."""
        stage, seeds = setup.stage, setup.seeds
        if stage.inherit is None:
            return None
        if path := adapt.source_of(stage):
            return start.Inherited(setup.network, [read_variables(path)] * seeds.count)
        reference = stage.inherit.source
        network, variables = self.with_network(reference, source=setup.source, default=stage, seeds=seeds)
        of_stage = parse_reference(reference).kind == "stage"
        return start.Inherited(network, seeds.unstack(variables) if of_stage else [variables] * seeds.count)

    def of_teacher(self, setup: Setup) -> dict[str, Any]:
        """Variables of a stage's teacher, or {} where no objective needs one."""
        teacher = setup.stage.teacher
        if setup.parts.teacher is None or teacher is None:
            return {}
        shapes = start.variable_shapes(setup.parts.teacher, setup.source.image_shape)
        return self.load(teacher.source, shapes, setup.seeds)


def load_checkpoint(path: Path, target: dict[str, Any], *, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Variables from a file (``other_files.FORMATS``), or from a checkpoint folder of ours.

    Args:
      path: the file; or a stage's folder, its ``checkpoints`` or one step in it, or a run of one stage.
      target: shapes of the network's variables.
      image_shape: (H, W, C) of the images it reads.

    Raises:
      CheckpointError: missing, damaged, or of another network; the networks that the file fits are named.
    """
    if not path.exists():
        raise CheckpointError(f"--checkpoint={path}: no such file or folder")
    if path.is_file():
        with naming_what_fits(image_shape, path):
            return import_file(path, target)
    directory, step = describe(path)
    with CheckpointStore(directory, read_only=True) as store:
        return store.restore(target, which="last" if step is None else step)[0]


@contextlib.contextmanager
def naming_what_fits(image_shape: tuple[int, int, int], path: Path) -> Iterator[None]:
    """Adds to an error about a file of another network its path and the names of the networks that it fits."""
    try:
        yield
    except Misfit as error:
        names = networks_that_fit(error.found, image_shape)
        raise CheckpointError(f"{path}: {error}; it fits {', '.join(names) or 'no network here'}") from None


def read_variables(path: Path) -> dict[str, Any]:
    """The variables in a file or a checkpoint folder, whatever their network is, by our paths.

    Raises:
      CheckpointError: missing or damaged.
    """
    if is_exported(path):
        return restart.arrays_of(artefact.load(path))
    if path.is_file():
        return read_arrays(path)
    directory, step = describe(path)
    with CheckpointStore(directory, read_only=True) as store:
        try:
            chosen = max(store.steps(), default=0) if step is None else step
            shapes = Header.read(directory / str(chosen)).shapes(VARIABLES)
        except Damage as damage:
            raise CheckpointError(f"{directory}: damaged checkpoint: {damage}") from damage
        return adapt.flat_arrays(store.restore(shapes, which="last" if step is None else step)[0])
