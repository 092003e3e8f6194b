"""Knobs: what is not given or not read is refused, and every context carries the values of its own network.

The quantizer here is made so that everything shows in its weights: they are the knob's value times a sign.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnn_jax import methods, quantizers
from bnn_jax.errors import UserError
from bnn_jax.experiment import start
from bnn_jax.experiment.build import check_knobs
from bnn_jax.knobs import ERROR_DECAY_K, Knob
from bnn_jax.objectives import Objective
from bnn_jax.quantizers.base import Encoded, QuantContext, WeightQuantizer, encode_integers, evaluation_context
from bnn_jax.stages import Inherit, ParameterGroup, QuantSpec, Stage, Teacher, spec
from bnn_jax.storage.weights import encoded_weights
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import Evaluator, PathEvaluator
from bnn_jax.training.step import compile_train_steps
from tests.integration.launching import QUICKSTART, launch_well, records, result
from tests.training import tiny

GAIN = Knob("gain", "size of every weight", default=1.0)
GAINS = {"first": (4.0, -3.0), "second": (0.5, 0.25)}


class FollowsKnob(WeightQuantizer):
    """``Q = gain * (+1 where w >= 0, else -1)``; the state ``seen`` is the gain of the pass that made it."""

    bits: float = 1.0

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return (GAIN,)

    @nn.compact
    def __call__(self, latent: jax.Array, ctx: QuantContext) -> jax.Array:
        gain = jnp.float32(ctx.knob(GAIN))
        self.variable("quant_state", "seen", lambda: gain)
        signs = jnp.where(latent >= 0, 1.0, -1.0)
        return gain * (latent + jax.lax.stop_gradient(signs - latent))

    def encode(self, latent: jax.Array, ctx: QuantContext) -> Encoded:
        return encode_integers(jnp.where(latent >= 0, 1.0, -1.0), jnp.float32(ctx.knob(GAIN)), -1, 1, step=2)


@dataclasses.dataclass(frozen=True)
class TeachersLogits(Objective):
    """The sum of the teacher's logits, as it is logged."""

    name = "teachers_logits"
    needs = frozenset({"teacher_logits"})

    def __call__(self, outputs, batch, state, ctx):
        assert outputs.teacher_logits is not None
        return jnp.sum(outputs.teacher_logits) + 0.0 * jnp.sum(outputs.logits)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(quantizers.WEIGHT, "follows_knob", FollowsKnob)


NETWORK = tiny.TinyNetwork(weight=spec("follows_knob"))


def variables_with(gain: float) -> dict[str, Any]:
    return {**tiny.variables(NETWORK), "knobs": {"gain": jnp.float32(gain)}}


def kernels_of(folder) -> list[np.ndarray]:
    return [array for name, array in np.load(folder / "weights.npz").items() if name.endswith("/kernel")]


# ---- what a stage has to give


def stage_with(*knobs: str, weight: str = "follows_knob", **changes: Any) -> Stage:
    schedules = tuple((name, spec("constant", value=1.0)) for name in knobs)
    return dataclasses.replace(tiny.stage(), quant=QuantSpec(weight=spec(weight)), knobs=schedules, **changes)


def test_a_knob_that_is_read_and_not_given_is_refused():
    with pytest.raises(UserError, match=r"^stage tiny: knob 'gain' \(size of every weight\): the stage gives it no"):
        check_knobs(stage_with())
    check_knobs(stage_with("gain"))


@pytest.mark.parametrize("name", ["gian", "temperature"])
def test_a_knob_that_is_given_and_not_read_is_refused(name):
    with pytest.raises(UserError, match=rf"^stage tiny: knob '{name}': nothing in this stage reads it; read are gain$"):
        check_knobs(stage_with("gain", name))


def test_a_quantizer_inside_another_one_is_asked_too():
    quant = QuantSpec(weight=spec("pruned", inner=spec("follows_knob")), act=spec("irnet"))
    with pytest.raises(UserError, match=f"knob 'error_decay_k' .{ERROR_DECAY_K.meaning}.*gain"):
        check_knobs(dataclasses.replace(stage_with("gain"), quant=quant))


def test_a_knob_of_a_parameter_group_has_to_be_given():
    optim = dataclasses.replace(tiny.stage().optim, groups=(ParameterGroup(".*", gradient_knob="refine"),))
    check_knobs(stage_with("gain", "refine", optim=optim))
    with pytest.raises(UserError, match="knob 'refine': the stage gives it no schedule"):
        check_knobs(stage_with("gain", optim=optim))


def test_a_stage_may_leave_out_what_the_published_method_leaves_out():
    check_knobs(stage_with(weight="codebook"))
    check_knobs(stage_with("refine_codebook", weight="codebook"))


# ---- every context has the values of its own network


def test_evaluation_search_and_export_read_the_stored_value():
    data, devices = tiny.source(num_test=12), all_devices()
    options = {"prepare": tiny.prepare_for_evaluation, "batch_size": 12, "devices": devices}
    evaluate = Evaluator(NETWORK, splits={"test": data.test}, **options)
    search = PathEvaluator(NETWORK, split=data.test, paths_at_once=2, **options)
    found = {}
    for gain in (1.0, -1.0):
        variables = devices.replicate(variables_with(gain))
        images = tiny.prepare_for_evaluation(jnp.asarray(data.test.images))
        logits = NETWORK.apply(variables, images, QuantContext(knobs={"gain": jnp.float32(gain)})).logits
        top1 = 100 * float(np.mean(np.argmax(logits, axis=-1) == data.test.labels))
        evaluated = evaluate(variables, "test")
        assert evaluated is not None and evaluated["top1"] == pytest.approx(top1)
        assert search(variables, [[0], [1]], np.arange(12)) == pytest.approx([top1, top1])
        kernel = encoded_weights(NETWORK, variables, (tiny.SIZE, tiny.SIZE, 3))["conv"].decode()
        np.testing.assert_array_equal(
            np.sign(kernel), gain * np.where(variables["params"]["conv"]["kernel"] >= 0, 1, -1)
        )
        found[gain] = top1
    assert found[1.0] != found[-1.0]


def test_without_a_stored_value_the_default_holds():
    assert evaluation_context({}).knob(GAIN) == GAIN.default


def test_what_is_made_anew_sees_the_value_of_its_own_network():
    images = jnp.zeros((1, tiny.SIZE, tiny.SIZE, 3))
    result = start.recompute_program(NETWORK)(start.without(variables_with(2.5), ("/seen$",)), images)
    assert result["quant_state"]["conv"]["weight_quantizer"]["seen"] == 2.5
    assert result["knobs"] == {"gain": 2.5}


def test_a_teacher_keeps_its_own_value_and_the_student_stores_the_last_one():
    data = tiny.source(num_train=8)
    parts = tiny.parts(
        network=NETWORK, objectives=(TeachersLogits(),), teacher=NETWORK, knobs={"gain": lambda step: 5.0 + step}
    )
    step = compile_train_steps(parts, all_devices())
    rows, mask = jnp.arange(8)[None], jnp.ones((1, 8), bool)
    sums = []
    for gain in (1.0, -2.0):
        state = tiny.state(parts).replace(knobs={"gain": jnp.float32(0)})
        for _ in range(2):
            state, metrics = step(state, tiny.constants(data, variables_with(gain)), rows, mask)
        assert float(state.variables["knobs"]["gain"]) == 6.0
        sums.append(float(metrics["loss/teachers_logits"][0]))
    # With the student's value both would be the same.
    assert sums[0] != sums[1]


# ---- through launch.py


def stages(config: Any) -> tuple[Stage, ...]:
    """Two stages of one epoch; the second is taught by the first, which ends with another gain."""
    plain = methods.asbq.stages(config)[0]
    first, second = (
        dataclasses.replace(
            plain,
            name=name,
            quant=QuantSpec(weight=spec("follows_knob")),
            knobs=(("gain", spec("piecewise", boundaries=(0.5,), values=values)),),
        )
        for name, values in GAINS.items()
    )
    records = {"inherit": Inherit("stage:first@last"), "teacher": Teacher("stage:first@last")}
    return first, dataclasses.replace(second, objectives=(spec("distillation"),), **records)


def test_train_evaluate_and_export_agree(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "asbq", stages)
    launch_well(QUICKSTART, f"--workdir={tmp_path}")
    for folder, (name, (_, last)) in zip(("00_first", "01_second"), GAINS.items(), strict=True):
        for kernel in kernels_of(tmp_path / folder):
            np.testing.assert_array_equal(np.abs(kernel), abs(last))
        ask = (QUICKSTART, "--json", "--mode=evaluate", f"--stage={name}")
        for where in (f"--workdir={tmp_path}", f"--checkpoint={tmp_path / folder}"):
            found = launch_well(*ask, where).last_json
            assert found["loss"] == pytest.approx(records(tmp_path / folder)[-1]["test_loss"])
            assert found["top1"] == result(tmp_path / folder)["last_top1"]
