"""From a config to stages, and from a stage to the objects that train it; nothing here reads or writes a file."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from bnn_jax import data, methods, networks, objectives, quantizers, schedules
from bnn_jax.catalogue import facts_of
from bnn_jax.data.augment import prepare_train
from bnn_jax.data.memory import ImageSource
from bnn_jax.errors import UserError
from bnn_jax.experiment import start
from bnn_jax.objectives import Objective
from bnn_jax.stages import Stage, parse_reference
from bnn_jax.training import projections
from bnn_jax.training.frozen import frozen_part, regular_expression
from bnn_jax.training.loop import Setup, steps_per_epoch
from bnn_jax.training.optimizer import make_optimizer
from bnn_jax.training.seeds import Seeds
from bnn_jax.training.step import StepParts, needs_teacher, uniform_choice


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config and what its method makes of it.

    Attributes:
      config: validated config.
      stages: the chain; with several seeds, that of the first one.
    """

    config: Mapping[str, Any]
    stages: tuple[Stage, ...]

    @property
    def cpu_kernels(self) -> str:
        """What convolves on a CPU, ``config.train.cpu_kernels``."""
        return self.config["train"]["cpu_kernels"]

    def find(self, name: str) -> Stage:
        """The stage of that name.

        Raises:
          UserError: the chain has no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(f"--stage={name}: accepted are {', '.join(stage.name for stage in self.stages)}")

    def describe(self, stage: Stage) -> tuple[tuple[int, int, int], int]:
        """Image shape (H, W, C) and number of classes of the stage's images, without reading any."""
        return data.describe(stage.data, data_dir=self.config["data"]["data_dir"])

    def stage_behind(self, reference: str, default: Stage) -> Stage:
        """The stage whose network a reference's variables belong to; those of a file belong to ``default``'s."""
        parsed = parse_reference(reference)
        return self.find(parsed.target) if parsed.kind == "stage" else default

    def teacher_stage(self, stage: Stage) -> Stage:
        """A stage with the network of a stage's teacher.

        Raises:
          UserError: the stage has no teacher.
        """
        teacher = stage.teacher
        if teacher is None:
            raise UserError(f"stage {stage.name}: an objective needs a teacher, and the stage names none")
        if teacher.network is None:
            return self.stage_behind(teacher.source, stage)
        return self.stage_behind(
            teacher.source, dataclasses.replace(stage, network=teacher.network, quant=teacher.quant)
        )


def make_experiment(config: Mapping[str, Any]) -> Experiment:
    """The experiment that a validated config describes."""
    return Experiment(config, methods.build(config))


def of_seed(experiment: Experiment, index: int) -> Experiment:
    """The experiment of one of several seeds, counted from 0, as it is without the others."""
    config = experiment.config
    if config["num_seeds"] == 1:
        return experiment
    return make_experiment({**config, "seed": config["seed"] + index, "num_seeds": 1})


def seeds_of(experiment: Experiment, stage: Stage) -> Seeds:
    """The seeds a stage is trained with."""
    each = [of_seed(experiment, index) for index in range(experiment.config["num_seeds"])]
    stages = [one.find(stage.name) for one in each]
    return Seeds(
        names=tuple(one.config["seed"] for one in each),
        orders=tuple(own.seed for own in stages),
        initials=tuple(own.init_seed for own in stages),
        own_teachers=stage.teacher is not None and parse_reference(stage.teacher.source).kind == "stage",
    )


def build_network(stage: Stage, num_classes: int, *, trained: bool = False, cpu_kernels: str = "auto") -> Any:
    """The stage's network, a Linen module.

    Args:
      stage: the stage.
      num_classes: outputs.
      trained: whether it is the one that training steps differentiate, which ``stage.remat`` is about. The others can
        be looked into: what is computed a second time hides its values.
      cpu_kernels: ``Experiment.cpu_kernels``.

    Raises:
      UserError: there is no such network, or an option does not fit.
    """
    remat = trained and stage.remat
    execution = {"compute_dtype": stage.compute_dtype, "remat": remat, "cpu_kernels": cpu_kernels}
    try:
        return networks.build(stage.network, stage.quant, num_classes=num_classes, **execution)
    except ValueError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def described_network(experiment: Experiment, stage: Stage) -> tuple[Any, dict[str, Any]]:
    """The stage's network and the shapes of its variables, for the images that the stage describes.

    Raises:
      UserError: it cannot be built, or not for images of this size.
    """
    image_shape, num_classes = experiment.describe(stage)
    network = build_network(stage, num_classes, cpu_kernels=experiment.cpu_kernels)
    what = f"stage {stage.name}: network {stage.network.name!r} with images of {'x'.join(map(str, image_shape))}"
    least = facts_of(stage.network.name).least_side
    if min(image_shape[:2]) < least:
        raise UserError(f"{what}: they are too small; accepted are {least}x{least} and larger")
    try:
        return network, start.variable_shapes(network, image_shape)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}") from error


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


def set_up(experiment: Experiment, stage: Stage, source: ImageSource) -> Setup:
    """Builds the objects of a stage; the teacher's network too, not its variables.

    Args:
      experiment: the experiment.
      stage: one of its stages.
      source: the stage's images.

    Raises:
      UserError: something cannot be built.
    """
    check_knobs(stage)
    build = functools.partial(build_network, num_classes=source.num_classes, cpu_kernels=experiment.cpu_kernels)
    network = build(stage)
    shapes = start.variable_shapes(network, source.image_shape)
    timing = {"steps_per_epoch": steps_per_epoch(stage, len(source.train)), "epochs": stage.optim.epochs}
    schedule = schedules.build(stage.optim.learning_rate, **timing)
    terms, frozen = build_objectives(stage), frozen_part(stage.freeze, shapes["params"])
    parts = StepParts(
        network=build(stage, trained=True),
        objectives=terms,
        optimizer=make_optimizer(
            stage.optim,
            shapes["params"],
            schedule=schedule,
            unused_parameters=(*network.unused_parameters, *map(regular_expression, stage.freeze)),
            branch_patterns=getattr(network, "branch_patterns", ()),
        ),
        prepare=functools.partial(
            prepare_train,
            mean=source.mean,
            std=source.std,
            augment=source.augment,
            pad=source.pad,
            lighting=stage.data.lighting,
            color_jitter=stage.data.color_jitter,
        ),
        knobs={name: schedules.build(knob, **timing) for name, knob in stage.knobs},
        teacher=build(experiment.teacher_stage(stage)) if needs_teacher(terms) else None,
        log_gradient_norms=stage.log_gradient_norms,
        projections=tuple(projections.build(projection) for projection in stage.projections),
        choose=uniform_choice(len(network.branch_patterns), network.branches) if stage.choice == "uniform" else None,
        accumulation_steps=stage.optim.accumulation_steps,
        frozen=frozen,
        mixup=stage.data.mixup,
        ema_decay=stage.optim.ema_decay,
    )
    return Setup(stage, source, schedule, network, parts, shapes, seeds_of(experiment, stage))
