"""Checks of the parts: the choice itself, layers, the by-bit mode, optimiser, schedules, published curves."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnn_jax import methods, schedules
from bnn_jax.experiment.config import validate
from bnn_jax.layers import QuantConv, QuantDense
from bnn_jax.ops import categorical
from bnn_jax.quantizers import QuantContext, build_weight
from bnn_jax.quantizers.categorical import VALUE_SETS
from bnn_jax.stages import OptimSpec, ParameterGroup, Spec, spec
from bnn_jax.training.optimizer import group_labels, make_optimizer
from configs import weight_search_resnet18, weight_search_resnet20, weight_search_vgg_small
from tests.golden.asbq.support import nchw, nhwc
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.weight_search.support import (
    candidates_first,
    candidates_last,
    kernel_to_ours,
    kernel_to_pytorch,
    logits_to_ours,
    logits_to_pytorch,
    relative,
    to_ours,
    to_pytorch,
    training_context,
    values_of,
)


def _check_value_set(file: GoldenFile, result: Comparison) -> tuple[float, ...]:
    """The list of a file named after one of our sets is that set."""
    name, values = file.path.stem.partition("_")[2], values_of(file["values"])
    result.exact(f"values of {name}", VALUE_SETS[name], values)
    return values


def _value_and_gradient(
    choose: Callable, scores: jax.Array, values: tuple[float, ...], temperature: Any, cotangent: Any
):
    value, pullback = jax.vjp(lambda s: choose(s, values, jnp.float32(temperature)), scores)
    return value, candidates_last(pullback(jnp.asarray(cotangent))[0])


def check_categorical(file: GoldenFile, result: Comparison) -> None:
    """Choice, probabilities, expectation and both gradients, at several temperatures."""
    values, scores = _check_value_set(file, result), candidates_first(file["alpha"])
    result.exact("index", categorical.chosen_index(scores), file["index"])
    for row, temperature in enumerate(file["temps"]):
        p = candidates_last(categorical.probabilities(scores, jnp.float32(temperature)))
        relative(result, f"prob T={temperature}", p, file["prob"][row], 2e-6)
        for mode, choose in categorical.CHOICES.items():
            w, gradient = _value_and_gradient(choose, scores, values, temperature, file["cotangent"])
            what = f"w_{mode} T={temperature}"
            if mode == "hard":
                result.exact(what, w, file["w_hard"][row])
            else:
                relative(result, what, w, file["w_soft"][row], 2e-6)
            relative(result, f"galpha_{mode} T={temperature}", gradient, file[f"galpha_{mode}"][row], 1e-5)


def check_gumbel(file: GoldenFile, result: Comparison) -> None:
    """The same with the recorded noise added."""
    cases = file.cases(r"c\d+_")
    result.exact("ncases", len(cases), file["ncases"])
    for match in cases:
        case = match.group()
        gumbel, factor = candidates_first(file[f"{case}gumbel"]), float(file[f"{case}random"])
        scores = categorical.with_noise(candidates_first(file[f"{case}alpha"]), gumbel, factor)
        for mode, choose in categorical.CHOICES.items():
            values, temperature = values_of(file[f"{case}values"]), file[f"{case}temp"]
            w, gradient = _value_and_gradient(choose, scores, values, temperature, file[f"{case}cotangent"])
            if mode == "hard":
                result.exact(f"{case}w_hard", w, file[f"{case}w_hard"])
            else:
                relative(result, f"{case}w_soft", w, file[f"{case}w_soft"], 2e-5)
            relative(result, f"{case}galpha_{mode}", gradient, file[f"{case}galpha_{mode}"], 2e-5)


def _conv(cfg: np.ndarray, quantizer: Spec) -> QuantConv:
    """A convolution from (Cin, Cout, kernel, stride, pad, groups)."""
    _, features, kernel, stride, pad, groups = map(int, cfg)
    return QuantConv(
        features,
        kernel_size=(kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        groups=groups,
        weight_quantizer=build_weight(quantizer),
    )


def _realised(quantizer: Spec, logits: jax.Array, state: dict[str, Any] | None = None) -> np.ndarray:
    """Evaluation weights of a quantizer in the release's layout."""
    variables = {} if state is None else {"quant_state": state}
    return kernel_to_pytorch(build_weight(quantizer)().apply(variables, logits, QuantContext()))


def check_layer(file: GoldenFile, result: Comparison) -> None:
    """Convolutions (strides, padding, groups) and a dense layer: outputs, gradients; the soft mode in both phases."""
    values = _check_value_set(file, result)
    hard, soft = (spec("categorical", values=values, mode=mode) for mode in ("hard", "soft"))
    cases = file.cases(r"conv\d+_")
    result.exact("nconv", len(cases), file["nconv"])
    for match in cases:
        case = match.group()
        cfg, logits = file[f"{case}cfg"], logits_to_ours(file[f"{case}alpha"])
        x, ctx = nhwc(file[f"{case}x"]), training_context(file[f"{case}temp"])
        result.exact(f"{case}w", _realised(hard, logits), file[f"{case}w"])
        y, pullback = jax.vjp(lambda a, x, c=cfg, t=ctx: _apply(_conv(c, hard), {"kernel": a}, x, t), logits, x)
        g_logits, gx = pullback(nhwc(file[f"{case}gy"]))
        soft_train, soft_eval = (
            _apply(_conv(cfg, soft), {"kernel": logits}, x, phase) for phase in (ctx, ctx.replace(train=False))
        )
        own = {"y": y, "gx": gx, "y_soft_train": soft_train, "y_soft_eval": soft_eval}
        for name, value in own.items():
            relative(result, case + name, nchw(value), file[case + name], 1e-5)
        relative(result, f"{case}galpha", logits_to_pytorch(g_logits), file[f"{case}galpha"], 1e-5)
    _check_dense(file, result, hard)


def _apply(layer: nn.Module, params: dict[str, Any], x: jax.Array, ctx: QuantContext) -> Any:
    return layer.apply({"params": params}, x, ctx)


def _check_dense(file: GoldenFile, result: Comparison, quantizer: Spec) -> None:
    """The searched dense layer of a ``layer`` file."""
    layer = QuantDense(len(file["lin_bias"]), weight_quantizer=build_weight(quantizer))
    params = {"kernel": logits_to_ours(file["lin_alpha"]), "bias": jnp.asarray(file["lin_bias"])}
    ctx = training_context(file["lin_temp"])
    y, pullback = jax.vjp(lambda p, x: _apply(layer, p, x, ctx), params, jnp.asarray(file["lin_x"]))
    grads, gx = pullback(jnp.asarray(file["lin_gy"]))
    relative(result, "lin_y", y, file["lin_y"], 1e-5)
    relative(result, "lin_gx", gx, file["lin_gx"], 1e-5)
    relative(result, "lin_gbias", grads["bias"], file["lin_gbias"], 1e-5)
    relative(result, "lin_galpha", logits_to_pytorch(grads["kernel"]), file["lin_galpha"], 1e-5)


def check_by_bit(file: GoldenFile, result: Comparison) -> None:
    """The incremental mode: a sign first, then a factor of a fixed weight."""
    for active_bit in (0, 1):
        case = f"ab{active_bit}_"
        base = file[f"{case}init_weight"]
        # Of bit 0 the fixed weights are ones, which is: none.
        levels = values_of(np.unique(base)) if active_bit else ()
        if not active_bit:
            result.exact(f"{case}init_weight", base, np.ones_like(base))
        values = values_of(file[f"{case}bit_weight"])
        quantizer = spec("categorical", values=values, base_levels=levels, mode="hard")
        logits, ctx = logits_to_ours(file[f"{case}alpha"]), training_context(file[f"{case}temp"])
        state = {"base": kernel_to_ours(base)} if active_bit else {}
        result.exact(f"{case}w", _realised(quantizer, logits, state), file[f"{case}w"])
        layer = _conv(np.array([base.shape[1], base.shape[0], base.shape[2], 1, 1, 1]), quantizer)
        variables = {"quant_state": {"weight_quantizer": state}} if active_bit else {}
        x = nhwc(file[f"{case}x"])
        y, pullback = jax.vjp(
            lambda a, x, v=variables, f=layer, t=ctx: f.apply({"params": {"kernel": a}, **v}, x, t), logits, x
        )
        g_logits, gx = pullback(nhwc(file[f"{case}gy"]))
        relative(result, f"{case}y", nchw(y), file[f"{case}y"], 1e-5)
        relative(result, f"{case}gx", nchw(gx), file[f"{case}gx"], 1e-5)
        relative(result, f"{case}galpha", logits_to_pytorch(g_logits), file[f"{case}galpha"], 1e-5)
    fresh = build_weight(spec("categorical", values=(1.0, 0.5), base_levels=(-1.0, 1.0), start="even"))()
    start = fresh.latent_init(None)(jax.random.key(0), logits.shape)
    w, _ = fresh.init_with_output(jax.random.key(0), start, QuantContext())
    result.exact("ab1_w_fresh", kernel_to_pytorch(w), file["ab1_w_fresh"])
    result.exact("ab0_w_fresh", file["ab0_w_fresh"], [0.0])


# Layers of the recorded optimiser that are searched, as a pattern of our paths; QuantSGD's second group.
SEARCHED = "^[23]/"


def check_optimizer(file: GoldenFile, result: Comparison) -> None:
    """SGD as it is used, with one group, and the release's unused optimiser with two."""
    names = [str(name) for name in file["param_names"]]
    initial = {name: to_ours(name, file[f"init/{name}"]) for name in names}
    labels = group_labels(_nested(initial), (ParameterGroup(SEARCHED), ParameterGroup(".*")))
    counts = [jax.tree.leaves(labels).count(label) for label in ("1", "0")]
    result.exact("quantsgd_counts", counts, file["quantsgd_counts"])
    grads = {name: file[f"grads/{name}"] for name in names}
    for match in file.cases(r"([^/]+)/hparams"):
        case = match.group(1)
        params = _nested(initial)
        recipe = _recipe(*map(float, file[f"{case}/hparams"]), frozen=case == "q_frozen", two_groups=case[0] == "q")
        rate, factors = recipe.learning_rate.kwargs["value"], jnp.asarray(file["lr_mult"], jnp.float32)
        optimizer = make_optimizer(recipe, params, schedule=lambda step, r=rate, f=factors: r * f[step])
        state = optimizer.init(params)
        for step in range(len(factors)):
            step_grads = _nested({name: to_ours(name, grads[name][step]) for name in names})
            changes, state = optimizer.update(step_grads, state, params, ctx=QuantContext())
            params = optax.apply_updates(params, changes)
            for name in names:
                module, _, leaf = name.partition(".")
                own = to_pytorch(name, params[module][leaf])
                relative(result, f"{case}/{name} step {step}", own, file[f"{case}/{name}"][step], 2e-6)


def _nested(flat: dict[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
    nested: dict[str, dict[str, jax.Array]] = {}
    for name, value in flat.items():
        module, _, leaf = name.partition(".")
        nested.setdefault(module, {})[leaf] = value
    return nested


def _recipe(
    rate: float, momentum: float, decay: float, dampening: float, nesterov: float, *, frozen: bool, two_groups: bool
) -> OptimSpec:
    searched = ParameterGroup(SEARCHED, weight_decay=decay, learning_rate_scale=0.0 if frozen else 1.0)
    return OptimSpec(
        optimizer=spec("sgd", momentum=momentum, nesterov=bool(nesterov), dampening=dampening),
        learning_rate=spec("constant", value=rate),
        epochs=1,
        batch_size=1,
        groups=(*([searched] if two_groups else []), ParameterGroup(".*", weight_decay=decay)),
    )


# Configs of the project for the release's files of settings, and what has to be changed.
RECIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "vggsmall-200": (weight_search_vgg_small, {}),
    "resnet20-200": (weight_search_resnet20, {}),
    "resnet18-120": (weight_search_resnet18, {}),
    "resnet18-120-fast": (weight_search_resnet18, {"temperature_rate": 0.94}),
    "resnet18-120-faster": (weight_search_resnet18, {"temperature_rate": 0.93}),
    "resnet18-lqnet": (
        weight_search_resnet18,
        {
            "temperature_rate": 0.94,
            "temperature_floor": 1e-3,
            "learning_rate_boundaries": (10.0, 30.0, 60.0, 85.0, 95.0, 105.0),
        },
    ),
}


def check_schedules(file: GoldenFile, result: Comparison) -> None:
    """Temperature and learning rate, epoch by epoch, of every recipe as our configs state it; a cosine by step."""
    for match in file.cases(r"(.+)/temp$"):
        name = match.group(1)
        module, changes = RECIPES[name]
        config = module.get_config()
        config.weight_search.update(changes)
        (stage,) = methods.build(validate(config.to_dict()))
        timing = {"steps_per_epoch": 7, "epochs": stage.optim.epochs}
        first_steps = 7 * jnp.arange(stage.optim.epochs)
        own = {"temp": dict(stage.knobs)["temperature"], "lr_epoch": stage.optim.learning_rate}
        for what, choice in own.items():
            reference = file[f"{name}/{what}"]
            # The release's cosine is a recursion: relative to its largest value.
            atol = 1e-6 * reference.max() if choice.name.startswith("cosine") else 0.0
            values = jax.vmap(schedules.build(choice, **timing))(first_steps)
            result.close(f"{name}/{what}", values, reference, rtol=1e-6, atol=atol)
    for match in file.cases(r"perbatch_lr([\d.]+)_total(\d+)$"):
        rate, total = float(match.group(1)), int(match.group(2))
        schedule = schedules.build(spec("cosine", initial=rate), steps_per_epoch=total, epochs=1)
        result.close(match.group(), jax.vmap(schedule)(jnp.arange(total)), file[match.group()], atol=1e-6 * rate)


# Best and last top-1 in percent of the published runs (specification, sections 1 and 4), and the best one's epoch.
PUBLISHED = {
    "resnet20_fp": (91.77, 198, 91.65),
    "resnet20_1b": (90.70, 164, 90.69),
    "resnet20_2b": (91.52, 167, 91.39),
    "resnet20_3b": (91.71, 197, 91.60),
    "vggsmall_fp": (93.87, 193, 93.80),
    "vggsmall_1b": (93.91, 184, 93.79),
    "vggsmall_2b": (93.83, 189, 93.81),
    "vggsmall_3b": (93.68, 195, 93.60),
}


def check_published_curves(file: GoldenFile, result: Comparison) -> None:
    """The curves our runs are set beside hold what the tables say: epochs, bests and their epochs, last values."""
    epochs = file["epoch"]
    result.exact("epoch", epochs, np.arange(1, 201))
    for match in file.cases(r"(\w+)_(val|train)$"):
        name, kind = match.groups()
        curve, measured = file[match.group()], file[f"{match.group()}_measured"]
        result.exact(f"{name} length", [curve.shape, measured.shape], [epochs.shape] * 2)
        result.require(f"{name} within 0 and 1", bool(np.all((curve > 0) & (curve <= 1))))
        if kind == "train":
            # The files' README counts 51; the file itself has 52.
            result.close(f"{match.group()} interpolated", (~measured).sum(), 51, atol=1)
            result.close(f"{match.group()} last", 100 * curve[-1], 100.0, atol=0.005)
            continue
        best, at, last = PUBLISHED[name]
        # The table's rounding.
        result.close(f"{name} best", 100 * curve.max(), best, atol=0.005 + 1e-9)
        result.close(f"{name} last", 100 * curve[-1], last, atol=0.005 + 1e-9)
        result.exact(f"{name} best epoch", epochs[np.argmax(curve)], at)
        result.require(f"{name} few interpolated", 4 <= (~measured).sum() <= 13)
    seconds = file["seconds_per_epoch_resnet20_5runs"]
    result.close("seconds, search over full precision", (seconds / seconds[0])[[1, -1]], [1.27, 1.39], atol=0.005)
