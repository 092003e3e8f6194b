"""From a stage's description to the objects that train it: network, data, optimiser, step, initial state, teacher."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import data, hosts, methods, networks, objectives, quantizers, schedules
from bnn_jax.data.augment import prepare_eval, prepare_train
from bnn_jax.data.memory import ImageSource, Split
from bnn_jax.data.order import index_plan
from bnn_jax.data.stream import StreamedSplit
from bnn_jax.errors import CheckpointError, UserError
from bnn_jax.experiment import folder as run_folder
from bnn_jax.experiment import start
from bnn_jax.objectives import Objective
from bnn_jax.schedules import Schedule
from bnn_jax.search.folds import Folds, make_folds
from bnn_jax.stages import QuantSpec, Stage, parse_choice, parse_reference
from bnn_jax.storage.checkpoint import CheckpointStore, describe
from bnn_jax.storage.pytorch import import_pytorch
from bnn_jax.storage.weights import encoded_weights, put_base
from bnn_jax.training import projections, seeds
from bnn_jax.training.devices import Devices
from bnn_jax.training.evaluate import Evaluator
from bnn_jax.training.loop import steps_per_epoch
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.seeds import Seeds
from bnn_jax.training.state import TrainState
from bnn_jax.training.step import StepParts, needs_teacher, uniform_choice


class Run:
    """A validated config, its stages and its folder.

    Attributes:
      config: validated config.
      folder: run folder.
      stages: the chain; with several seeds, that of the first one.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path):
        self.config, self.folder = config, Path(folder)
        self.stages: tuple[Stage, ...] = methods.build(config)

    @property
    def num_seeds(self) -> int:
        """Number of seeds that are trained side by side; their checkpoints hold variables stacked (N, ...)."""
        return self.config["num_seeds"]

    def alone(self, index: int, loaded: dict[str, Any] | None = None) -> "Run":
        """The run of one of the seeds as it would be without the others; it reads its part of what they share.

        Args:
          index: place of the seed, from 0.
          loaded: variables that were read for other seeds, by reference; added to.
        """
        return self if self.num_seeds == 1 else _OneOfSeeds(self, index, {} if loaded is None else loaded)

    def seeds_of(self, stage: Stage) -> Seeds:
        """The seeds of a stage."""
        runs = [self.alone(index) for index in range(self.num_seeds)]
        return Seeds(
            names=tuple(run.config["seed"] for run in runs),
            orders=tuple(run.find(stage.name).seed for run in runs),
            own_teachers=stage.teacher is not None and parse_reference(stage.teacher).kind == "stage",
        )

    def find(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
          UserError: the chain has no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(f"--stage={name}: accepted are {', '.join(stage.name for stage in self.stages)}")

    def stage_folder(self, stage: Stage) -> Path:
        """'<run folder>/<nn>_<stage>'."""
        return self.folder / f"{self.stages.index(stage):02d}_{stage.name}"

    def checkpoints(self, stage: Stage) -> Path:
        """The folder of the stage's checkpoints."""
        return self.stage_folder(stage) / run_folder.CHECKPOINTS

    def describe(self, stage: Stage) -> tuple[tuple[int, int, int], int]:
        """Image shape (H, W, C) and number of classes of the stage's images, without reading any."""
        return data.describe(stage.data, data_dir=self.config["data"]["data_dir"])

    def load_data(self, stage: Stage) -> ImageSource:
        """The stage's images, in memory."""
        return _load_data(stage.data, self.config["data"]["data_dir"], self.config["seed"])

    def network(self, stage: Stage, *, num_classes: int, trained: bool = False) -> Any:
        """The stage's network, a Linen module.

        Args:
          stage: the stage.
          num_classes: outputs.
          trained: whether it is the one that training steps differentiate, which ``stage.remat`` is about. The others
            can be looked into: what is computed a second time hides its values.
        """
        try:
            return networks.build(
                stage.network,
                stage.quant,
                num_classes=num_classes,
                compute_dtype=stage.compute_dtype,
                remat=trained and stage.remat,
            )
        except ValueError as error:
            raise UserError(f"stage {stage.name}: {error}") from None

    def load_variables(self, reference: str, target: dict[str, Any]) -> dict[str, Any]:
        """Variables a reference points to.

        Args:
          reference: 'stage:NAME', 'stage:NAME@best' or 'file:PATH'.
          target: shapes of the variables of one seed.

        Returns:
          The variables; those of a stage are stacked where there are several seeds.

        Raises:
          CheckpointError: nothing is saved there, it is damaged, or it is of another network.
        """
        parsed = parse_reference(reference)
        if parsed.kind == "file":
            return load_checkpoint(Path(parsed.target), target)
        target = seeds.stack_shapes(target, self.num_seeds)
        with CheckpointStore(self.checkpoints(self.find(parsed.target)), read_only=True) as store:
            return store.restore(target, which=parsed.which)[0]

    def fold_result(self, choice: str) -> dict[str, Any]:
        """What a search found on the fold that a choice names.

        Raises:
          CheckpointError: that fold was not searched.
        """
        name, fold = parse_choice(choice)
        path = self.stage_folder(self.find(name)) / fold_path(fold)
        result = run_folder.read_json(path)
        if result is None:
            raise CheckpointError(f"{path} is missing; train stage {name} first")
        return result

    def evaluated_choice(self, stage: Stage, network: Any) -> tuple[int, ...] | None:
        """Branches a stage's network is evaluated with: the winner, or the middle ones of a supernet; None without."""
        if getattr(network, "branches", 1) == 1:
            return None
        if stage.choice in (None, "uniform"):
            return (network.branches // 2,) * len(network.branch_patterns)
        return tuple(self.fold_result(stage.choice)["path"])

    def referenced(self, reference: str, *, source: ImageSource, default: Stage) -> tuple[Any, dict[str, Any]]:
        """Network and variables a reference points to; a file holds variables of ``default``'s network."""
        parsed = parse_reference(reference)
        stage = self.find(parsed.target) if parsed.kind == "stage" else default
        network = self.network(stage, num_classes=source.num_classes)
        return network, self.load_variables(reference, start.variable_shapes(network, source.image_shape))


class _OneOfSeeds(Run):
    """The run of one of several seeds, within the folder of them all."""

    def __init__(self, together: Run, index: int, loaded: dict[str, Any]):
        super().__init__({**together.config, "seed": together.config["seed"] + index, "num_seeds": 1}, together.folder)
        self._together, self._index, self._loaded = together, index, loaded

    def load_variables(self, reference: str, target: dict[str, Any]) -> dict[str, Any]:
        if reference not in self._loaded:
            self._loaded[reference] = self._together.load_variables(reference, target)
        variables = self._loaded[reference]
        return variables if parse_reference(reference).kind == "file" else seeds.take(variables, self._index)


def fold_path(fold: int) -> str:
    """Name of the file with a fold's result, in the folder of the search."""
    return f"fold_{fold:02d}.json"


def searched_split(search: Stage, source: ImageSource) -> Split | StreamedSplit:
    """The images a search looks at.

    Raises:
      UserError: they are to be held out from training, and none are.
    """
    assert search.search is not None
    if search.search.kwargs["search_on"] == "test":
        return source.test
    if source.validation is None:
        raise UserError(f"stage {search.name}: no images are held out; config.data.validation_fraction says how many")
    return source.validation


def folds_of(search: Stage, source: ImageSource) -> Folds:
    """The folds of a search's images."""
    assert search.search is not None
    options = search.search.kwargs
    return make_folds(
        searched_split(search, source).labels,
        kind=options["fold_kind"],
        count=options["folds"],
        batch_size=options["fold_batch"],
    )


@functools.lru_cache(maxsize=1)
def _load_data(spec: Any, data_dir: str | None, seed: int) -> ImageSource:
    """All stages of a chain use the same images, so they are decoded once."""
    return data.build(spec, data_dir=data_dir, seed=seed, progress=hosts.is_first())


def load_checkpoint(path: Path, target: dict[str, Any]) -> dict[str, Any]:
    """Variables from a file of PyTorch's, or from a checkpoint folder of ours.

    Args:
      path: '.pth', '.pth.tar', '.pt' or '.th' file; or a stage's folder, its ``checkpoints`` or one step in it.
      target: shapes of the network's variables.

    Raises:
      CheckpointError: missing, damaged, or of another network.
    """
    if not path.exists():
        raise CheckpointError(f"--checkpoint={path}: no such file or folder")
    if path.is_file():
        # Such a file holds no knobs: their defaults hold.
        return import_pytorch(path, {name: shapes for name, shapes in target.items() if name != "knobs"})
    directory, step = describe(path)
    with CheckpointStore(directory, read_only=True) as store:
        return store.restore(target, which="last" if step is None else step)[0]


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The objects of a stage.

    Attributes:
      stage: the stage.
      source: its images.
      schedule: its learning rate by step.
      network: its network, for all but the training steps.
      parts: what its training step is made of.
      shapes: shapes of the network's variables.
    """

    stage: Stage
    source: ImageSource
    schedule: Schedule
    network: Any
    parts: StepParts
    shapes: dict[str, Any]

    def first_knobs(self) -> dict[str, jax.Array]:
        """Values of the stage's knobs in its first step."""
        return {name: schedule(jnp.int32(0)) for name, schedule in self.parts.knobs.items()}

    def state_shapes(self, devices: Devices) -> TrainState:
        """Shapes of the training state of one seed, for restoring one."""
        return jax.eval_shape(lambda variables: self.create_state(variables, devices), self.shapes)

    def create_state(
        self, variables: dict[str, Any], devices: Devices, *, seed: int | tuple[int, ...] | None = None
    ) -> TrainState:
        """The state before the first step; of several seeds from stacked variables, None is that of the stage."""
        return start.create_state(
            variables,
            optimizer=self.parts.optimizer,
            objectives=self.parts.objectives,
            num_classes=self.source.num_classes,
            seed=self.stage.seed if seed is None else seed,
            devices=devices,
            log_gradient_norms=self.stage.log_gradient_norms,
            log_train_top5=self.stage.log_train_top5,
        )


def build_objectives(stage: Stage) -> tuple[Objective, ...]:
    """The stage's loss terms."""
    return tuple(objectives.build(term) for term in stage.objectives)


def check_knobs(stage: Stage) -> None:
    """Checks that a stage gives a schedule to every knob that something in it reads, and to no other.

    Raises:
      UserError: a knob is not given or not read.
    """
    others = (*build_objectives(stage), *map(projections.build, stage.projections))
    readers = {knob.name: knob for reader in others for knob in reader.knobs}
    readers.update({knob.name: knob for knob in quantizers.declared_knobs(stage.quant)})
    gates = {group.gradient_knob for group in stage.optim.groups if group.gradient_knob is not None}
    needed, given = gates | {knob.name for knob in readers.values() if not knob.optional}, dict(stage.knobs)
    accepted = f"read are {', '.join(sorted(gates | readers.keys())) or 'none'}"
    for name in sorted(given.keys() - readers.keys() - gates):
        raise UserError(f"stage {stage.name}: knob {name!r}: nothing in this stage reads it; {accepted}")
    for name in sorted(needed - given.keys()):
        meaning = f" ({readers[name].meaning})" if name in readers else ""
        raise UserError(f"stage {stage.name}: knob {name!r}{meaning}: the stage gives it no schedule; {accepted}")


def assemble(run: Run, stage: Stage, source: ImageSource) -> Assembly:
    """Builds the objects of a stage; the teacher's network too, not its variables."""
    check_knobs(stage)
    network = run.network(stage, num_classes=source.num_classes)
    shapes = start.variable_shapes(network, source.image_shape)
    timing = {"steps_per_epoch": steps_per_epoch(stage, len(source.train)), "epochs": stage.optim.epochs}
    schedule = schedules.build(stage.optim.learning_rate, **timing)
    terms = build_objectives(stage)
    parts = StepParts(
        network=run.network(stage, num_classes=source.num_classes, trained=True),
        objectives=terms,
        optimizer=make_optimizer(
            stage.optim,
            shapes["params"],
            schedule=schedule,
            unused_parameters=network.unused_parameters,
            branch_patterns=getattr(network, "branch_patterns", ()),
        ),
        prepare=functools.partial(
            prepare_train,
            mean=source.mean,
            std=source.std,
            augment=source.augment,
            pad=source.pad,
            lighting=stage.data.lighting,
        ),
        knobs={name: schedules.build(knob, **timing) for name, knob in stage.knobs},
        teacher=_teacher_network(run, stage, source) if needs_teacher(terms) else None,
        log_gradient_norms=stage.log_gradient_norms,
        projections=tuple(projections.build(projection) for projection in stage.projections),
        choose=uniform_choice(len(network.branch_patterns), network.branches) if stage.choice == "uniform" else None,
        accumulation_steps=stage.optim.accumulation_steps,
    )
    return Assembly(stage=stage, source=source, schedule=schedule, network=network, parts=parts, shapes=shapes)


def _teacher_network(run: Run, stage: Stage, source: ImageSource) -> Any:
    if stage.teacher is None:
        raise UserError(f"stage {stage.name}: an objective needs a teacher, and the stage names none")
    parsed = parse_reference(stage.teacher)
    teacher = run.find(parsed.target) if parsed.kind == "stage" else _stage_of_teacher_file(stage)
    return run.network(teacher, num_classes=source.num_classes)


def _stage_of_teacher_file(stage: Stage) -> Stage:
    """The stage with the network whose variables a teacher's file holds."""
    if stage.teacher_network is None:
        return stage
    return dataclasses.replace(stage, network=stage.teacher_network, quant=stage.teacher_quant or QuantSpec())


def teacher_variables(run: Run, assembly: Assembly) -> dict[str, Any]:
    """Variables of the stage's teacher, or {} where no objective needs one."""
    if assembly.parts.teacher is None or assembly.stage.teacher is None:
        return {}
    default = _stage_of_teacher_file(assembly.stage)
    return run.referenced(assembly.stage.teacher, source=assembly.source, default=default)[1]


def initial_variables(run: Run, assembly: Assembly, *, shared: start.Programs | None = None) -> dict[str, Any]:
    """Variables before the first step: fresh, then copied, then made anew where the stage says so.

    Args:
      run: the run, of one seed.
      assembly: the stage.
      shared: compiled functions that other seeds use too; None compiles them for this one.
    """
    stage, source = assembly.stage, assembly.source
    indices, _ = index_plan(
        stage.seed,
        0,
        num_images=len(source.train),
        batch_size=min(stage.optim.batch_size, len(source.train)),
        drop_last=False,
    )
    images = prepare_eval(jnp.asarray(_images(source.train, indices[0])), mean=source.mean, std=source.std)
    variables = start.init_variables(
        assembly.network, jax.random.key(stage.init_seed), images, knobs=assembly.first_knobs(), shared=shared
    )
    if stage.init_from is not None:
        network, copied = run.referenced(stage.init_from, source=source, default=stage)
        fresh = variables
        variables = start.transfer(copied, fresh, collections=stage.transfer, may_be_new=stage.may_be_new)
        if stage.realised_base:
            variables = put_base(variables, fresh, encoded_weights(network, copied, source.image_shape))
    return start.recompute(assembly.network, variables, images, patterns=stage.recompute, shared=shared)


def initial_state(run: Run, assembly: Assembly, devices: Devices) -> TrainState:
    """The state before the first step of a stage; of several seeds each one's, stacked."""
    if run.num_seeds == 1:
        variables = hosts.values_of_first(initial_variables(run, assembly))
        return assembly.create_state(variables, devices)
    loaded: dict[str, Any] = {}
    shared = start.programs(assembly.network)
    each = []
    for index in range(run.num_seeds):
        alone = run.alone(index, loaded)
        own = dataclasses.replace(assembly, stage=alone.find(assembly.stage.name))
        each.append(initial_variables(alone, own, shared=shared))
    return assembly.create_state(seeds.stack(each), devices, seed=run.seeds_of(assembly.stage).orders)


def _images(split: Split | StreamedSplit, indices: np.ndarray) -> np.ndarray:
    """Some images of a split, uint8 (N, H, W, C); where they are read when needed, cropped as in evaluation."""
    return split.images[indices] if isinstance(split, Split) else next(split.batches(indices[None]))[0]


def make_evaluator(
    run: Run, stage: Stage, network: Any, source: ImageSource, devices: Devices, *, only_test: bool = False
) -> Evaluator:
    """Evaluates on 'test', where the source has one on 'validation', and a fold's winner on 'others', outside of it."""
    splits = {"test": source.test}
    if source.validation is not None and not only_test:
        splits["validation"] = source.validation
    if stage.choice not in (None, "uniform") and not only_test:
        name, fold = parse_choice(stage.choice)
        search = run.find(name)
        split = searched_split(search, source)
        splits["others"] = split.take(folds_of(search, source).others(fold))
    return Evaluator(
        network,
        prepare=functools.partial(prepare_eval, mean=source.mean, std=source.std),
        splits=splits,
        batch_size=run.config["train"]["eval_batch_size"],
        devices=devices,
        workers=run.config["data"]["workers"],
        choice=run.evaluated_choice(stage, network),
        seeds=run.seeds_of(stage),
    )
