"""Checks of SNN's activations, losses, blocks and networks."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from bnn_jax import networks, objectives, schedules
from bnn_jax.data.augment import change_light
from bnn_jax.experiment.config import validate
from bnn_jax.experiment.start import variable_shapes
from bnn_jax.layers.activation import LearnableBias, RPRelu
from bnn_jax.methods import snn
from bnn_jax.networks.base import NetworkOutput
from bnn_jax.networks.blocks import BLOCKS
from bnn_jax.objectives.base import Batch, Objective, Outputs
from bnn_jax.ops import ste
from bnn_jax.ops.codebook import all_patterns
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import IDENTITY, QuantSpec, Stage, spec
from bnn_jax.storage import pytorch
from bnn_jax.training import projections
from bnn_jax.training.devices import all_devices
from bnn_jax.training.evaluate import compile_eval_step
from bnn_jax.training.optimizer import group_labels
from bnn_jax.training.projections import Update
from configs import snn_resnet18
from tests.golden.asbq.support import nchw, nhwc, to_pytorch
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.skd_bnn.support import relative_to_largest

# Published loss: the teacher's probabilities as labels, at temperature 1.
SOFT_LABELS = spec("distillation", measure="cross_entropy")
# Every how many forward passes the codebooks are refined.
INTERVAL = 25


def quant_spec(tau: int | None) -> QuantSpec:
    """Quantizers of the inner convolutions; None is the first step, with real weights."""
    weight = IDENTITY if tau is None else spec("codebook", tau=tau)
    return QuantSpec(weight=weight, act=spec("approx_sign"))


def context(*, train: bool, refine: bool) -> QuantContext:
    """Context of a pass."""
    return QuantContext(train=train, knobs={"refine_codebook": jnp.float32(refine)})


def in_pytorch_form(variables: Mapping[str, Any], names: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our arrays by PyTorch's names, in its layout and shapes.

    Args:
      variables: collections.
      names: arrays by PyTorch's names, of which only the shapes are used.

    Raises:
      KeyError: a name that is no variable of ours.
    """
    flat, own = flatten_dict(dict(variables), sep="/"), {}
    for name, reference in names.items():
        path = pytorch.to_path(name, ndim=reference.ndim)
        value = flat[path]
        own[name] = to_pytorch(value) if path.endswith("/kernel") else np.asarray(value).reshape(reference.shape)
    return own


def compare_arrays(
    result: Comparison,
    case: str,
    variables: Mapping[str, Any],
    expected: Mapping[str, np.ndarray],
    *,
    rtol: float,
    floor: float = 0.0,
) -> None:
    """Compares arrays by PyTorch's names, each relative to its largest element."""
    for name, value in in_pytorch_form(variables, expected).items():
        relative_to_largest(result, case + name, value, expected[name], rtol=rtol, floor=floor)


def compare_gradients(
    result: Comparison, case: str, gradients: Any, expected: Mapping[str, np.ndarray], *, rtol: float
) -> None:
    """Compares all gradients; a parameter of ours the file has none for, a codebook, has a gradient of zeros."""
    compare_arrays(result, case, {"params": gradients}, expected, rtol=rtol)
    paths = {pytorch.to_path(name, ndim=array.ndim) for name, array in expected.items()}
    for path, gradient in flatten_dict({"params": gradients}, sep="/").items():
        if path not in paths:
            result.require(f"{case}{path}: no gradient expected of it", path.endswith("codebook"))
            result.exact(f"{case}{path}", gradient, jnp.zeros_like(gradient))


def maintained(variables: Mapping[str, Any], gradients: Any, *, refine: bool) -> dict[str, Any]:
    """Variables after the codebooks' maintenance in the release's order; nothing recorded here needed new patterns."""
    projection = projections.build(spec("refill_codebooks", maintenance="release"))
    update = Update(variables["params"], variables.get("quant_state", {}), {}, gradients)
    update = projection(update, context(train=True, refine=refine), jax.random.key(0))
    state = {"quant_state": update.quant_state} if update.quant_state else {}
    return {**variables, "params": update.params, **state}


# ---- activations


def check_activation(file: GoldenFile, result: Comparison) -> None:
    """The sign with its polynomial gradient, RSign, RPReLU."""
    file.not_compared("margin_.+")
    cotangent = nhwc(file["cot"])
    y, pullback = jax.vjp(ste.approx_sign, nhwc(file["x"]))
    result.close("y", nchw(y), file["y"], atol=1e-6)
    result.close("dx", nchw(pullback(cotangent)[0]), file["dx"], atol=1e-6)
    edge, edge_pullback = jax.vjp(ste.approx_sign, jnp.asarray(file["x_edge"]))
    result.close("y_edge", edge, file["y_edge"], atol=1e-6)
    result.close("dx_edge", edge_pullback(jnp.ones_like(edge))[0], file["dx_edge"], atol=1e-6)
    bias = {name: file[name].reshape(-1) for name in ("b0", "b1", "slope", "b2")}

    def shifted_sign(x, params):
        return ste.approx_sign(LearnableBias().apply({"params": params}, x))

    def rectified(x, params):
        return RPRelu().apply({"params": params}, x)

    signs = {"bias": bias["b0"]}
    shifts = {
        "input_shift": {"bias": bias["b1"]},
        "prelu": {"slope": bias["slope"]},
        "output_shift": {"bias": bias["b2"]},
    }
    leaves = {"rsign": {"bias": "db0"}, "rprelu": {"input_shift/bias": "db1", "prelu/slope": "dslope"}}
    leaves["rprelu"]["output_shift/bias"] = "db2"
    for name, function, params in (("rsign", shifted_sign, signs), ("rprelu", rectified, shifts)):
        y, pullback = jax.vjp(function, nhwc(file["x"]), params)
        dx, gradients = pullback(cotangent)
        result.close(f"{name}_y", nchw(y), file[f"{name}_y"], atol=1e-6)
        result.close(f"{name}_dx", nchw(dx), file[f"{name}_dx"], atol=1e-6)
        flat = flatten_dict(gradients, sep="/")
        for path, stored in leaves[name].items():
            result.close(f"{name}_{stored}", flat[path], file[f"{name}_{stored}"].reshape(-1), atol=1e-5)


# ---- losses, rates, light


def check_loss(file: GoldenFile, result: Comparison) -> None:
    """Loss terms, accuracies, learning rates and lighting."""
    # Label smoothing is created by the release and used nowhere; the library has none.
    file.not_compared("ls|ls_ds")
    batch = Batch(
        jnp.zeros((len(file["y"]), 1, 1, 3)), jnp.asarray(file["y"], jnp.int32), jnp.ones(len(file["y"]), bool)
    )
    for name, choice in (("kd", SOFT_LABELS), ("ce", spec("cross_entropy"))):
        value, gradient = jax.value_and_grad(functools.partial(_term, choice, file["t"], batch))(file["s"])
        result.close(name, value, file[name], atol=1e-6, rtol=1e-6)
        result.close(f"{name}_ds", gradient, file[f"{name}_ds"], atol=1e-6)
    _check_accuracies(file, result, batch)
    for match in file.cases(r"lr_E(\d+)$"):
        epochs, name = int(match.group(1)), match.group()
        initial = {256: 1e-3, 128: 2.5e-3}[epochs]
        values = schedules.linear_by_epoch_values(initial=initial, epochs=epochs)
        result.close(name, values, file[name], atol=1e-12)
        choice = spec("linear_by_epoch", initial=initial)
        schedule = schedules.build(choice, steps_per_epoch=2, epochs=epochs)
        result.close(f"{name} in float32", schedule(jnp.arange(2 * epochs)), np.repeat(file[name], 2), rtol=1e-6)
    images = jnp.broadcast_to(jnp.asarray(file["light_img"]), file["light_out"].shape)
    own = change_light(images, jnp.asarray(file["light_randn"], jnp.float32), in_pixel_units=False)
    result.exact("light_out", own, file["light_out"])


def _term(choice: Any, teacher: np.ndarray, batch: Batch, logits: jax.Array) -> jax.Array:
    outputs = Outputs(logits=logits, features=logits, teacher_logits=jnp.asarray(teacher))
    return objectives.build(choice)(outputs, batch, {}, QuantContext(train=True))


@dataclasses.dataclass(frozen=True)
class ConstantNetwork:
    """A network whose logits are its variables, row by row of the images, which hold their own numbers."""

    def apply(self, variables: Any, images: jax.Array, ctx: QuantContext) -> NetworkOutput:
        """The rows of the variables."""
        rows = variables[images[:, 0, 0, 0].astype(jnp.int32)]
        return NetworkOutput(logits=rows, features=rows)


def _check_accuracies(file: GoldenFile, result: Comparison, batch: Batch) -> None:
    """The library's evaluation step counts what the release's function gives in percent."""
    rows = np.arange(len(file["s"]), dtype=np.int32)
    step = compile_eval_step(ConstantNetwork(), lambda images: images, all_devices())
    images = rows.astype(np.float32)[:, None, None, None]
    indices, mask = (a[0] for a in all_devices().pad_rows(rows[None], np.ones((1, rows.size), bool)))
    sums = step(jnp.asarray(file["s"]), images, batch.labels, indices, mask)
    for name, count in (("top1", "correct1"), ("top5", "correct5")):
        result.close(name, 100 * sums[count] / sums["count"], file[name].item(), rtol=1e-6)


# ---- blocks


def check_blocks(file: GoldenFile, result: Comparison) -> None:
    """A block with and without a change of shape, with real weights (s1) or codebooks (s2), refined or not."""
    with_codebook = file.path.stem.endswith("s2")
    for match in file.cases(r"c\d+_"):
        case = match.group()
        tau, stride = int(file[f"{case}tau"]), int(file[f"{case}stride"])
        # Forward passes done; blocks with real weights count none.
        refine = (int(file[f"{case}step_before"]) + 1) % INTERVAL == 0 and with_codebook
        state = file.group(f"{case}in.")
        layers = networks.build(spec("reactnet20"), quant_spec(tau if with_codebook else None), num_classes=2).layers
        features = state["binary_conv.weight"].shape[0]
        block = BLOCKS["reactnet"](features=features, stride=stride, layers=layers)
        _check_block(file, result, case, block, state, refine=refine)


def _check_block(
    file: GoldenFile, result: Comparison, case: str, block: Any, state: Mapping[str, np.ndarray], *, refine: bool
) -> None:
    x, ctx = nhwc(file[f"{case}x"]), context(train=True, refine=refine)
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, ctx), x)
    variables = pytorch.import_state(state, shapes)

    def run(params: Any, x: jax.Array):
        return block.apply({**variables, "params": params}, x, ctx, mutable=["batch_stats", "quant_state"])

    y, pullback, updates = jax.vjp(run, variables["params"], x, has_aux=True)
    gradients, dx = pullback(nhwc(file[f"{case}cot"]))
    relative_to_largest(result, f"{case}y", nchw(y), file[f"{case}y"], rtol=2e-5)
    relative_to_largest(result, f"{case}dx", nchw(dx), file[f"{case}dx"], rtol=2e-5)
    compare_gradients(result, f"{case}grad.", gradients, file.group(f"{case}grad."), rtol=2e-5)
    after = maintained({**variables, **updates}, gradients, refine=refine)
    compare_arrays(result, f"{case}out.", after, file.group(f"{case}out."), rtol=2e-5)
    y_eval = block.apply(after, x, context(train=False, refine=False))
    relative_to_largest(result, f"{case}y_eval", nchw(y_eval), file[f"{case}y_eval"], rtol=2e-5)


# ---- networks


def network_of(shapes: Mapping[str, tuple[int, ...]], tau: int | None, **options: Any) -> Any:
    """ReActNet for ImageNet with the depth, widths and classes of a state by PyTorch's names."""
    matches = [re.fullmatch(r"layer(\d+)\.(\d+)\.binary_conv\.weight", name) for name in shapes]
    blocks = [(int(match.group(1)), shapes[match.string][0]) for match in matches if match]
    stages = sorted({stage for stage, _ in blocks})
    choice = spec(
        "reactnet18",
        stage_sizes=tuple(sum(other == stage for other, _ in blocks) for stage in stages),
        widths=tuple(next(width for other, width in blocks if other == stage) for stage in stages),
        **options,
    )
    return networks.build(choice, quant_spec(tau), num_classes=shapes["fc.weight"][0])


def load(state: Mapping[str, np.ndarray], image_shape: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """Network and variables of a state; strict."""
    codebooks = [array for name, array in state.items() if name.endswith("patterns")]
    tau = int(np.log2(len(codebooks[0]))) if codebooks else None
    network = network_of({name: array.shape for name, array in state.items()}, tau)
    return network, pytorch.import_state(state, variable_shapes(network, image_shape))


def check_model(file: GoldenFile, result: Comparison) -> None:
    """A pass of a small network in training mode, all gradients, and evaluation after it."""
    refine = file.path.stem.endswith("_refine")
    x = nhwc(file["x"])
    network, variables = load(file.group("in."), x.shape[1:])
    ctx = context(train=True, refine=refine)
    term: Objective = objectives.build(SOFT_LABELS)
    rows = jnp.ones(len(x), bool)

    def run(params: Any, x: jax.Array):
        output, updates = network.apply({**variables, "params": params}, x, ctx, mutable=["batch_stats", "quant_state"])
        outputs = Outputs(output.logits, output.features, teacher_logits=jnp.asarray(file["teacher_logits"]))
        batch = Batch(images=x, labels=jnp.zeros(len(x), jnp.int32), mask=rows)
        return term(outputs, batch, {}, ctx), (output.logits, updates)

    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (loss, (logits, updates)), (gradients, dx) = step(variables["params"], x)
    relative_to_largest(result, "logits", logits, file["logits"], rtol=1e-4)
    result.close("loss", loss, file["loss"], rtol=1e-4)
    relative_to_largest(result, "dx", nchw(dx), file["dx"], rtol=2e-3)
    compare_gradients(result, "grad.", gradients, file.group("grad."), rtol=2e-3)
    after = maintained({**variables, **updates}, gradients, refine=refine)
    compare_arrays(result, "out.", after, file.group("out."), rtol=1e-4)
    evaluated = jax.jit(lambda variables, x: network.apply(variables, x, QuantContext()).logits)(after, x)
    relative_to_largest(result, "logits_eval", evaluated, file["logits_eval"], rtol=1e-4)


# ---- the published network


def generated(file: GoldenFile) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """State and images of a ``full`` file, made as the files' README defines them."""
    names = {str(name): int(size) for name, size in zip(file["param_names"], file["param_sizes"], strict=True)}
    shapes = full_shapes(names)
    random, state = np.random.RandomState(int(file["rs_seed"])), {}
    for name, size in names.items():
        if name.endswith("patterns"):
            continue
        z = random.standard_normal(size).astype(np.float32).reshape(shapes[name])
        state[name] = _scaled(name, z)
    images = random.standard_normal((2, 3, int(file["hw"]), int(file["hw"]))).astype(np.float32)
    convolutions = [name.removesuffix(".weight") for name in state if name.endswith("binary_conv.weight")]
    books = [np.asarray(all_patterns())[rows] for rows in file["codebook_rows"]]
    for name, book in zip(convolutions, books, strict=True):
        state[f"{name}.binarize.patterns"] = book
    for layer, kernel, pattern in file["fixes"]:
        weight = state[f"{convolutions[layer]}.weight"]
        weight.reshape(-1, 9)[kernel] = np.float32(0.1) * books[layer][pattern]
    for name in [name for name in state if re.search(r"bn1\.bias$|downsample\.2\.bias$", name)]:
        norm = name.removesuffix("bias")
        state[f"{norm}running_mean"], state[f"{norm}running_var"] = (
            np.zeros_like(state[name]),
            np.ones_like(state[name]),
        )
    return state, images


def _scaled(name: str, z: np.ndarray) -> np.ndarray:
    if re.search(r"move\d\.bias$", name):
        return np.float32(0.2) * z
    if name.endswith("prelu.weight"):
        return np.float32(0.25) + np.float32(0.1) * z
    if name.endswith(".bias"):
        return np.float32(0.2) * z
    if re.search(r"bn1\.weight$|downsample\.2\.weight$", name):
        return 1 + np.float32(0.2) * z
    return np.float32(0.05 if name == "fc.weight" else 0.1) * z


def full_shapes(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes by PyTorch's names from the numbers of elements alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        block = name.split(".binary_conv")[0].split(".downsample")[0]
        inputs, outputs = sizes.get(f"{block}.move0.bias", 3), sizes.get(f"{block}.prelu.weight", sizes["bn1.weight"])
        if name == "fc.weight":
            shapes[name] = (sizes["fc.bias"], size // sizes["fc.bias"])
        elif name.endswith("patterns"):
            shapes[name] = (size // 9, 9)
        elif name == "conv1.weight" or re.search(r"binary_conv\.weight$|downsample\.1\.weight$", name):
            side = round((size / (inputs * outputs)) ** 0.5)
            shapes[name] = (outputs, inputs, side, side)
        else:
            shapes[name] = (1, size, 1, 1) if re.search(r"move\d\.bias$", name) else (size,)
    return shapes


def check_full(file: GoldenFile, result: Comparison) -> None:
    """A training pass of the published network: logits, statistics of every stage, groups of the weight decay."""
    file.not_compared("err_.+")
    state, images = generated(file)
    network, variables = load(state, (*images.shape[2:], 3))
    result.exact("tau", len(state["layer1.0.binary_conv.binarize.patterns"]), 2 ** int(file["tau"]))
    collections = ["batch_stats", "quant_state", "block_features"]
    ctx = context(train=True, refine=False)
    output, updates = jax.jit(lambda v, x: network.apply(v, x, ctx, mutable=collections))(variables, nhwc(images))
    relative_to_largest(result, "logits_train", output.logits, file["logits_train"], rtol=1e-3)
    for stage, size in enumerate(network.stage_sizes, start=1):
        feature = nchw(updates["block_features"][f"layer{stage}_{size - 1}"]["after_conv1"]).astype(np.float64)
        result.exact(f"stage{stage}_shape", feature.shape, file[f"stage{stage}_shape"])
        for what, own in (("mean", feature.mean((0, 2, 3))), ("std", feature.std((0, 2, 3), ddof=1))):
            relative_to_largest(result, f"stage{stage}_{what}", own, file[f"stage{stage}_{what}"], rtol=1e-3)
    after = {**variables, "batch_stats": updates["batch_stats"]}
    compare_arrays(result, "out.", after, file.group("out."), rtol=1e-3)
    _check_decay(file, result, variables["params"])


def _check_decay(file: GoldenFile, result: Comparison, params: Any) -> None:
    """The method's groups decay the parameters that the release does."""
    (stage,) = (stage for stage in snn_stages(snn_resnet18, weight_decays=(1.0,)) if stage.name == snn.SECOND)
    labels = flatten_dict({"params": group_labels(params, stage.optim.groups)}, sep="/")
    shapes = full_shapes({str(n): int(size) for n, size in zip(file["param_names"], file["param_sizes"])})
    paths = [pytorch.to_path(name, ndim=len(shape)) for name, shape in shapes.items()]
    result.exact("param_names", sorted(paths), sorted(labels))
    result.exact("param_sizes", [np.prod(shape) for shape in shapes.values()], file["param_sizes"])
    result.exact("decay", [stage.optim.groups[int(labels[path])].weight_decay > 0 for path in paths], file["decay"])


def snn_stages(file: Any, **changes: Any) -> tuple[Stage, ...]:
    """The stages of a config of the project with values of its section replaced."""
    config = file.get_config()
    config.snn.update(changes)
    return snn.stages(validate(config.to_dict()))


NETWORKS: dict[str, Callable[[GoldenFile, Comparison], None]] = {
    "activation": check_activation,
    "loss": check_loss,
    "block_s[12]": check_blocks,
    "model_s(1|2|2_refine)": check_model,
    "full_resnet18": check_full,
}
