"""Stages: a whole training run as plain data.

A method is a function ``stages(config) -> tuple[Stage, ...]``. Everything in a stage is a frozen dataclass of plain
values, so it can be printed, compared, written as JSON and fingerprinted; nothing here imports jax. An experiment turns
each stage into a network, a data source, objectives and an optimiser, trains it and hands its result to the next.
"""

import dataclasses
import hashlib
import json
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Spec:
    """A named choice from one of the tables (networks, quantizers, objectives, schedules) and its options.

    Attributes:
      name: key in the table.
      options: sorted pairs ``(keyword, value)``; a value is a number, a string, a bool, None, a tuple or another Spec.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def kwargs(self) -> dict[str, Any]:
        """The options as keyword arguments."""
        return dict(self.options)


def spec(name: str, **options: Any) -> Spec:
    """Builds a ``Spec``; options are sorted, so that equal choices compare and hash equal."""
    return Spec(name, tuple(sorted(options.items())))


IDENTITY = Spec("identity")


def added(default: Any) -> Any:
    """A field that records of older runs do not have: at its default it is left out, and fingerprints stay the same."""
    return dataclasses.field(default=default, metadata={"added": True})


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """Which quantizer each kind of layer uses.

    Attributes:
      weight: weight quantizer of the inner convolutions.
      act: activation quantizer of the inner convolutions.
      first: weight quantizer of the first layer (it reads the image).
      last: weight quantizer of the classifier.
      shortcut: weight quantizer of the 1x1 shortcut convolutions.
      searched: activation quantizer of the searched convolutions, whose branch ``QuantContext.choice`` selects.
    """

    weight: Spec = IDENTITY
    act: Spec = IDENTITY
    first: Spec = IDENTITY
    last: Spec = IDENTITY
    shortcut: Spec = IDENTITY
    searched: Spec = IDENTITY


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Which images are trained and evaluated on; the folder they lie in is no part of it.

    Attributes:
      name: key in the table of data sources ('cifar10', 'cifar100', 'digits', 'synthetic', ...).
      num_train: number of training images used, the first ones in the stored order; None takes all.
      num_eval: number of test images used; None takes all.
      validation_fraction: share of the training images held out to choose the best epoch; 0 chooses on the test set.
      augment: 'pad_crop_flip' (zero padding, random crop, horizontal flip), 'pad_crop', 'edge_crop_flip' (padding
        repeats the border), 'random_resized_crop_flip' (of images that are read while training) or 'none'.
      normalize: whether the channels are normalised; else pixels are used as they are, in [0, 1].
      mean: mean of pixels / 255 by channel that images are normalised with; (): the source's own.
      std: standard deviation, likewise.
      lighting: random change of light of the training images: 'none', 'release' or 'paper', see ``data.augment``.
      options: further options of the source, such as the image size of generated images.
      decoder: what decodes training images that are read while training: 'pillow' or 'opencv'; their pixels differ.
      mixup: alpha of the distribution that training images are mixed by, see ``training.mixup``; 0 mixes none.
      color_jitter: strength of the random change of colours in training, see ``data.color``; 0 changes none.
    """

    name: str
    num_train: int | None = None
    num_eval: int | None = None
    validation_fraction: float = 0.0
    augment: str = "pad_crop_flip"
    normalize: bool = True
    mean: tuple[float, ...] = added(())
    std: tuple[float, ...] = added(())
    options: tuple[tuple[str, Any], ...] = ()
    lighting: str = "none"
    decoder: str = "pillow"
    mixup: float = added(0.0)
    color_jitter: float = added(0.0)


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are optimised alike; the first group whose pattern matches a parameter's path takes it.

    Attributes:
      pattern: regular expression, searched in the path ('layer1_0/conv1/kernel').
      weight_decay: coupled L2 factor (gradient += weight_decay * parameter); a tuple gives one for each row of
        parameters with a leading branch axis.
      learning_rate_scale: factor on the learning rate; 0 freezes the group.
      bounds: smallest and largest value the parameters keep to after every step, or None.
      gradient_knob: name of a knob of the stage that is above 0 on the steps on which these parameters have a gradient;
        before the first such step nothing moves them and the optimiser's clock stands. None: every step has one.
      without_gradient: what a later step without a gradient does: 'step' takes it for a gradient of 0, so that momentum
        and weight decay go on (PyTorch 1.4, whose cleared gradients are zeros); 'skip' leaves parameters and optimiser
        alone (PyTorch from 2.0 on, whose cleared gradients are None).
    """

    pattern: str
    weight_decay: float | tuple[float, ...] = 0.0
    learning_rate_scale: float = 1.0
    bounds: tuple[float, float] | None = None
    gradient_knob: str | None = None
    without_gradient: Literal["step", "skip"] = "step"


@dataclasses.dataclass(frozen=True)
class OptimSpec:
    """How the parameters are optimised.

    Attributes:
      optimizer: 'sgd' (options momentum, nesterov, dampening), 'adam' or 'adamw' (options b1, b2, eps).
      learning_rate: schedule of the learning rate; its boundaries are in epochs.
      epochs: number of passes over the training images.
      batch_size: global batch size in images.
      groups: parameter groups; a parameter that no pattern matches is an error.
      drop_last_batch: whether the last, partial batch of an epoch is left out.
      gradient_clip_norm: global L2 norm the gradient is clipped to; None does not clip.
      unselected_branches: what a step does with the branches of a supernet that it did not choose. 'decay': their
        gradient is 0, so that weight decay and momentum move them (PyTorch before 2.0, and any version on several
        GPUs). 'freeze': nothing moves them and their optimiser's clock stands (PyTorch from 2.0 on, on one GPU).
      accumulation_steps: parts of a batch that pass through the network one after another; the step is taken along
        their mean gradient. BatchNorm normalises each part by itself.
      ema_decay: decay of the average over the steps that evaluation, export, teachers and later stages use in place of
        the weights, see ``training.averaging``; 0 averages nothing.
      early_stopping: epochs in a row without a better top-1 on the validation images after which the stage ends; 0: it
        never ends early.
    """

    optimizer: Spec
    learning_rate: Spec
    epochs: int
    batch_size: int
    groups: tuple[ParameterGroup, ...] = (ParameterGroup(".*"),)
    drop_last_batch: bool = False
    gradient_clip_norm: float | None = None
    unselected_branches: Literal["decay", "freeze"] = "decay"
    accumulation_steps: int = 1
    ema_decay: float = added(0.0)
    early_stopping: int = added(0)


@dataclasses.dataclass(frozen=True)
class Inherit:
    """What a stage takes over from saved variables before its first step.

    Attributes:
      source: 'stage:NAME', 'stage:NAME@best' or 'file:PATH'.
      collections: which collections are copied ('params', 'batch_stats', 'quant_state').
      may_be_new: regular expressions of paths ('params/...') that may be missing in the source and then keep their own
        initial value.
      recompute: regular expressions of paths ('quant_state/.*/mask') made anew from the copied variables.
      realised_base: whether the weights in use at the end of the source become the fixed weights
        ('quant_state/.../base') of the quantizers that have some; latent weights of these layers start afresh.
      adapt: whether the source is a file of a network that may have another classifier and other quantizers, see
        ``experiment.adapt``.
    """

    source: str
    collections: tuple[str, ...] = ("params",)
    may_be_new: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    realised_base: bool = False
    adapt: bool = added(False)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The network whose outputs an objective compares with.

    Attributes:
      source: where its variables come from: 'stage:NAME', 'stage:NAME@best' or 'file:PATH'.
      network: network of the variables in a file; None: the stage's own network with its quantizers. A stage brings
        its own network.
      quant: quantizers of ``network``.
    """

    source: str
    network: Spec | None = None
    quant: QuantSpec = QuantSpec()


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of the chain.

    Attributes:
      name: name of the stage, also of its folder.
      network: network and its options; the number of classes comes from the data.
      quant: quantizers of the network's layers.
      data: images.
      objectives: loss terms; the loss is their sum.
      optim: optimiser, schedule, epochs.
      knobs: (name, schedule) pairs evaluated at every step and handed to the quantizers and objectives.
      inherit: what is taken over from another stage or a file, or None.
      teacher: the teacher that an objective needs, or None.
      seed: seed of data order, augmentation and random draws.
      init_seed: seed of the initial variables (and so of pruning masks drawn from them).
      bits: nominal bits per weight, for tables only.
      compute_dtype: 'float32' or 'bfloat16' (convolutions of integer codes only).
      log_gradient_norms: whether the gradient norm of every objective is recorded; costs one backward pass for each.
      projections: changes made to parameters and state in every training step, between gradient and optimiser.
      kind: 'train', or 'search': looks for the best choices of the supernet that it inherits and trains nothing, so
        that objectives and optim say nothing but the batch size.
      choice: branches of a supernet: 'uniform' draws them anew in every step, 'search:NAME#I' takes the winner of fold
        I of a search; None for networks without branches.
      search: what a stage of kind 'search' does, with the folds of its images.
      remat: whether the backward pass computes the inside of every block a second time instead of keeping it, which
        needs less memory.
      log_train_top5: whether top-5 accuracy is recorded in training too.
      freeze: patterns of the parameters that training leaves as they are, see ``training.frozen``.
      log_flip_rate: whether the share of quantized weights that changed their sign is recorded, by layer.
    """

    name: str
    network: Spec
    quant: QuantSpec
    data: DataSpec
    objectives: tuple[Spec, ...]
    optim: OptimSpec
    knobs: tuple[tuple[str, Spec], ...] = ()
    inherit: Inherit | None = None
    teacher: Teacher | None = None
    seed: int = 0
    init_seed: int = 0
    bits: float = 32.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    log_gradient_norms: bool = False
    projections: tuple[Spec, ...] = ()
    kind: Literal["train", "search"] = "train"
    choice: str | None = None
    search: Spec | None = None
    log_train_top5: bool = False
    remat: bool = False
    freeze: tuple[str, ...] = added(())
    log_flip_rate: bool = added(False)

    @property
    def trains_winner(self) -> bool:
        """Whether it trains one path of a supernet, the one that a search found."""
        return self.choice not in (None, "uniform")

    @property
    def sources(self) -> tuple[str, ...]:
        """References to the saved variables that the stage starts from or is taught by."""
        return tuple(record.source for record in (self.inherit, self.teacher) if record is not None)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A parsed reference to saved variables.

    Attributes:
      kind: 'stage' or 'file'.
      target: the stage's name or the file's path.
      which: 'last' or 'best' epoch of a stage.
    """

    kind: Literal["stage", "file"]
    target: str
    which: Literal["last", "best"] = "last"


def parse_reference(text: str) -> Reference:
    """Parses 'stage:NAME', 'stage:NAME@best', 'stage:NAME@last' or 'file:PATH'.

    Raises:
      ValueError: the text has another form.
    """
    kind, _, target = text.partition(":")
    if kind == "file" and target:
        return Reference("file", target)
    if kind == "stage" and target:
        name, _, which = target.partition("@")
        if name and which in ("", "last", "best"):
            return Reference("stage", name, which or "last")  # type: ignore[arg-type]
    raise ValueError(f"reference {text!r}: accepted are 'stage:NAME', 'stage:NAME@best' and 'file:PATH'")


def parse_choice(text: str) -> tuple[str, int]:
    """Parses 'search:NAME#I', the winner of fold I of the search stage NAME.

    Raises:
      ValueError: the text has another form.
    """
    kind, _, target = text.partition(":")
    name, _, fold = target.partition("#")
    if kind != "search" or not name or not fold.isdigit():
        raise ValueError(f"choice {text!r}: accepted are 'uniform' and 'search:NAME#FOLD'")
    return name, int(fold)


def to_json(value: Any) -> Any:
    """Turns a stage, or any part of it, into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if isinstance(value, Spec):
            return {"name": value.name, **{key: to_json(option) for key, option in value.options}}
        fields = {field.name: (field, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {
            name: to_json(content)
            for name, (field, content) in fields.items()
            if "added" not in field.metadata or content != field.default
        }
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def fingerprint(stage: Stage, stages: tuple[Stage, ...]) -> str:
    """SHA-256 of the stage and of every stage it refers to, so that a change anywhere up the chain shows.

    Args:
      stage: the stage.
      stages: the whole chain, searched for the stages it refers to.
    """
    by_name = {other.name: other for other in stages}
    content: dict[str, Any] = {"stage": to_json(stage)}
    for source in stage.sources:
        if (reference := parse_reference(source)).kind == "stage":
            content[source] = fingerprint(by_name[reference.target], stages)
    if stage.choice is not None and stage.trains_winner:
        content["choice"] = fingerprint(by_name[parse_choice(stage.choice)[0]], stages)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differing_keys(old: Any, new: Any, path: str = "") -> list[str]:
    """Paths, with both values, at which two JSON values differ, e.g. 'optim.epochs: 2 -> 3'."""
    if isinstance(old, dict) and isinstance(new, dict):
        missing = object()
        found = []
        for key in sorted(old.keys() | new.keys()):
            here = f"{path}.{key}" if path else str(key)
            found += differing_keys(old.get(key, missing), new.get(key, missing), here)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [row for i, pair in enumerate(zip(old, new)) for row in differing_keys(*pair, f"{path}[{i}]")]
    if old == new:
        return []

    def show(value: Any) -> str:
        return "absent" if type(value) is object else json.dumps(value)

    return [f"{path}: {show(old)} -> {show(new)}"]
