"""SNN: sub-bit weights, in two steps taught by a full-precision network.

The first step binarises the activations alone, the second the weights too, every 3x3 kernel to one of the 2**tau
patterns of its layer's codebook. Both minimise the cross-entropy with a teacher's probabilities, without labels. Where
the teacher is no file it is the first stage. With ``config.snn.two_step=False`` the second step starts from scratch.

Every ``refine_interval``-th step the codebooks have a gradient, and duplicates among their patterns are replaced
("refinement"). The released program refines only on a single GPU: on several, each works on a copy whose changes are
thrown away, so that codebooks stay the random patterns they began with.

  paper         refinement; new patterns take the places of the duplicates, whose memory and moments are cleared
  release_1gpu  refinement; rows move up in place of the duplicates, memory and moments stay where they were
  release_4gpu  no refinement

Reference: Wang et al. 2021 (arXiv 2110.09195); release: yikaiw/SNN. First step and recipe: ReActNet, Liu et al. 2020
  (arXiv 2003.03488).
"""

from collections.abc import Mapping
from typing import Any, Literal

from bnn_jax.errors import UserError
from bnn_jax.keys import ALL_NOT_NEGATIVE, ALL_POSITIVE, POSITIVE, Key, Section, between
from bnn_jax.knobs import REFINE_CODEBOOK
from bnn_jax.methods.common import COLLECTIONS, TEACHER, data_spec, switches_of, teacher_keys, teacher_of, teacher_stage
from bnn_jax.stages import IDENTITY, Inherit, OptimSpec, ParameterGroup, QuantSpec, Stage, spec

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"refine": True, "maintenance": "clean", "pattern_optimizer": "release14"},
    "release_1gpu": {"refine": True, "maintenance": "release", "pattern_optimizer": "release14"},
    "release_4gpu": {"refine": False, "maintenance": "release", "pattern_optimizer": "release14"},
}

KEYS: Section = {
    "preset": Key("paper", "published settings that fill what is empty, see bnn_jax/methods/snn.py", tuple(PRESETS)),
    "tau": Key(
        5,
        "bits of an index; codebooks have 2**tau patterns, a weight tau/9 bits; 9: ordinary binary weights",
        between(1, 9),
    ),
    "two_step": Key(True, "whether a step of binary activations comes first; False: sub-bit weights from scratch"),
    "epochs": Key((256,), "epochs per step, or one number for both", ALL_POSITIVE),
    "learning_rate": Key(1e-3, "rate of Adam at the start, falling linearly to 0", POSITIVE),
    "weight_decays": Key((1e-5, 0.0), "L2 per step, or one for both", ALL_NOT_NEGATIVE),
    "refine": Key(None, "whether codebooks are trained", kind=bool),
    "refine_interval": Key(25, "steps from one gradient of the codebooks to the next", POSITIVE),
    "maintenance": Key(None, "where new patterns are put, see bnn_jax/methods/snn.py", ("clean", "release"), kind=str),
    "pattern_optimizer": Key(
        None,
        "Adam between two gradients of a codebook: goes on ('release14') or waits",
        ("release14", "skip"),
        kind=str,
    ),
    **teacher_keys("standard_resnet20"),
}

FIRST, SECOND = "binary_activations", "sub_bit"

# Knob of bnn_jax.quantizers.codebook.
# On the steps between two gradients of a codebook, Adam takes it for one of 0 (PyTorch 1.4), or does nothing (2.0).
WITHOUT_GRADIENT: dict[str, Literal["step", "skip"]] = {"release14": "step", "skip": "skip"}

CODEBOOKS = "/weight_quantizer/codebook$"
NEW_AT_SECOND = (CODEBOOKS, "/weight_quantizer/memory$")
# What the release decays: tensors with four axes. These are the kernels of all convolutions and, for the way they are
# stored, the shifts around signs and rectifiers; and the codebooks, for their name.
DECAYED = r"conv\d*/kernel$|_shift/bias$"


def stages(config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Teacher (unless it is a file), binary activations (unless from scratch), sub-bit weights.

    Args:
      config: validated config with the section ``snn``.

    Raises:
      UserError: a number of epochs or weight decays that does not fit the steps.
    """
    snn, switches = config["snn"], switches_of(config["snn"], PRESETS)
    steps = (FIRST, SECOND) if snn["two_step"] else (SECOND,)
    epochs, decays = (_by_step(config, key) for key in ("epochs", "weight_decays"))
    students = [
        _step(config, switches, name, epochs=epochs[name], weight_decay=decays[name], previous=previous)
        for previous, name in zip((None, *steps), steps)
    ]
    return (teacher_stage(config, snn, name=TEACHER), *students) if snn["teacher"] == "stage" else tuple(students)


def _by_step(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The values of both steps, by name, whether both are trained or not; a single value serves both."""
    values = config["snn"][key]
    if len(values) not in (1, 2):
        raise UserError(f"config.snn.{key}={values!r}: accepted is one value, or one for each of {FIRST}, {SECOND}")
    return {FIRST: values[0], SECOND: values[-1]}


def _step(
    config: Mapping[str, Any],
    switches: Mapping[str, Any],
    name: str,
    *,
    epochs: int,
    weight_decay: float,
    previous: str | None,
) -> Stage:
    snn, sub_bit = config["snn"], name == SECOND
    refine = sub_bit and switches["refine"]
    return Stage(
        name=name,
        network=spec(config["network"]),
        quant=QuantSpec(weight=spec("codebook", tau=snn["tau"]) if sub_bit else IDENTITY, act=spec("approx_sign")),
        data=data_spec(config),
        objectives=(spec("distillation", weight=1.0, temperature=1.0, measure="cross_entropy"),),
        optim=optim_spec(config, switches, sub_bit=sub_bit, epochs=epochs, weight_decay=weight_decay),
        knobs=((REFINE_CODEBOOK.name, spec("every", interval=snn["refine_interval"])),) if refine else (),
        projections=(spec("refill_codebooks", maintenance=switches["maintenance"]),) if refine else (),
        # The second step continues the first, running statistics included; only its codebooks are new.
        inherit=None if previous is None else Inherit(f"stage:{previous}@last", COLLECTIONS, may_be_new=NEW_AT_SECOND),
        teacher=teacher_of(snn, stage=TEACHER),
        seed=config["seed"] + (2000 if sub_bit else 1000),
        init_seed=config["seed"],
        bits=snn["tau"] / 9 if sub_bit else 32.0,
        compute_dtype=config["train"]["compute_dtype"],
    )


def optim_spec(
    config: Mapping[str, Any], switches: Mapping[str, Any], *, sub_bit: bool, epochs: int, weight_decay: float
) -> OptimSpec:
    """Adam whose rate falls linearly to 0, epoch by epoch; the codebooks with a clock of their own."""
    groups = (ParameterGroup(DECAYED, weight_decay=weight_decay), ParameterGroup(".*"))
    if sub_bit:
        groups = (_codebook_group(switches, weight_decay), *groups)
    return OptimSpec(
        optimizer=spec("adam"),
        learning_rate=spec("linear_by_epoch", initial=config["snn"]["learning_rate"]),
        epochs=epochs,
        batch_size=config["train"]["batch_size"],
        groups=groups,
        drop_last_batch=config["train"]["drop_last_batch"],
    )


def _codebook_group(switches: Mapping[str, Any], weight_decay: float) -> ParameterGroup:
    if not switches["refine"]:
        # PyTorch's Adam skips parameters that never get a gradient: no decay either.
        return ParameterGroup(CODEBOOKS, learning_rate_scale=0.0)
    return ParameterGroup(
        CODEBOOKS,
        weight_decay=weight_decay,
        gradient_knob=REFINE_CODEBOOK.name,
        without_gradient=WITHOUT_GRADIENT[switches["pattern_optimizer"]],
    )
