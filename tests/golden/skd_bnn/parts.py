"""Checks of the parts: binarizer, schedules, convolution, losses, label bank, residual blocks, a pooled stage."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import networks, schedules
from bnn_jax.layers import BatchNorm, QuantConv
from bnn_jax.networks.base import NetworkOutput
from bnn_jax.networks.blocks import BLOCKS
from bnn_jax.objectives.base import Batch, Outputs
from bnn_jax.objectives.self_distill import (
    Cluster,
    FeatureSwap,
    LabelBank,
    channel_and_spatial_distance,
    class_means,
)
from bnn_jax.ops import balance
from bnn_jax.ops.ste import hard_tanh
from bnn_jax.quantizers import build_act, build_weight
from bnn_jax.quantizers.base import QuantContext
from bnn_jax.stages import spec
from bnn_jax.storage import pytorch
from bnn_jax.training.step import StepParts, forward
from tests.golden.asbq.support import in_pytorch_form, nchw, nhwc, to_ours, to_pytorch, value_and_pullback
from tests.golden.comparison import Comparison, GoldenFile
from tests.golden.skd_bnn.support import (
    IRNET,
    bank_state,
    compare_estimator,
    compare_gradients,
    knobs_of,
    relative_to_largest,
)

# Blocks as the files call them: CIFAR ResNet-20, CIFAR ResNet-18, ImageNet ResNet-18.
BLOCK_OF = {"r20": "double_skip_padded", "r18": "single_skip", "in18": "double_skip"}


def check_binarize_and_schedules(file: GoldenFile, result: Comparison) -> None:
    """The sign with its decaying gradient; k, t and learning rate of every epoch."""
    quantizer = build_act(IRNET.act)()
    for j in range(int(file["n_cases"])):
        ctx = QuantContext(train=True, knobs=knobs_of(file[f"c{j}_k"], file[f"c{j}_t"]))
        y, pullback = jax.vjp(lambda x, ctx=ctx: quantizer.apply({}, x, ctx), jnp.asarray(file[f"c{j}_x"]))
        result.exact(f"c{j}_y", y, file[f"c{j}_y"])
        relative_to_largest(result, f"c{j}_dx", pullback(jnp.asarray(file[f"c{j}_g"]))[0], file[f"c{j}_dx"], rtol=1e-5)
    for match in file.cases(r"sched_([kt])_E(\d+)$"):
        epochs = int(match.group(2))
        schedule = schedules.build(spec(f"error_decay_{match.group(1)}"), steps_per_epoch=3, epochs=epochs)
        result.close(match.group(), schedule(3 * jnp.arange(epochs) + 2), file[match.group()], rtol=1e-6)
    for match in file.cases(r"lr_E(\d+)_W(\d+)_base([\d.e-]+)$"):
        _check_learning_rate(result, match.group(), *match.groups(), file[match.group()])


def _check_learning_rate(
    result: Comparison, case: str, epochs: str, warmup: str, base: str, reference: np.ndarray
) -> None:
    """The table in float64 as the file has it; the schedule is the same table rounded to float32."""
    options = {"initial": float(base), "warmup_epochs": int(warmup)}
    result.close(case, schedules.cosine_by_epoch_values(**options, epochs=int(epochs)), reference, rtol=1e-9)
    schedule = schedules.build(spec("cosine_by_epoch", **options), steps_per_epoch=3, epochs=int(epochs))
    result.close(f"{case} in float32", schedule(3 * jnp.arange(int(epochs))), reference, rtol=2.0**-24)


def check_skd_conv(file: GoldenFile, result: Comparison) -> None:
    """One convolution: both streams, standardised weights and their scale, gradients of the binary stream."""
    for case in (f"c{j}_" for j in range(int(file["n_cases"]))):
        w, stride, pad = file[case + "w"], int(file[case + "stride"]), int(file[case + "pad"])
        conv = QuantConv(
            features=w.shape[0],
            kernel_size=w.shape[2:],
            strides=(stride, stride),
            padding=((pad, pad), (pad, pad)),
            weight_quantizer=build_weight(IRNET.weight),
            act_quantizer=build_act(IRNET.act),
        )
        ctx = QuantContext(train=True, knobs=knobs_of(file[case + "k"], file[case + "t"]))
        kernel, real_x = to_ours(w), nhwc(file[case + "realx"])

        def both(x, kernel, g, conv=conv, ctx=ctx, real_x=real_x):
            def streams(x, kernel):
                y, taps = conv.apply({"params": {"kernel": kernel}}, x, ctx, mutable=["taps"])
                return y, conv.apply({"params": {"kernel": kernel}, **taps}, real_x, ctx.replace(stream="real"))

            values, pullback = jax.vjp(streams, x, kernel)
            return values, pullback((g, jnp.zeros_like(g))), pullback((jnp.zeros_like(g), g))

        values, gradients, real_gradients = jax.jit(both)(nhwc(file[case + "x"]), kernel, nhwc(file[case + "g"]))
        (y, real_y), (dx, dw) = values, gradients
        result.close(case + "y", nchw(y), file[case + "y"], atol=1e-6)
        result.close(case + "realy", nchw(real_y), file[case + "realy"], atol=1e-6)
        for name, gradient in zip(("x", "w"), real_gradients):
            result.exact(f"{case}realy, no gradient of {name}", gradient, jnp.zeros_like(gradient))
        standardized, scale = standardized_and_scale(kernel)
        result.close(case + "bw", to_pytorch(standardized), file[case + "bw"], atol=1e-5)
        result.close(case + "sw", scale, file[case + "sw"], atol=1e-6)
        relative_to_largest(result, case + "dx", nchw(dx), file[case + "dx"], rtol=2e-5)
        relative_to_largest(result, case + "dw", to_pytorch(dw), file[case + "dw"], rtol=2e-5)


@jax.jit
def standardized_and_scale(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights the real stream multiplies with, and the scale per filter of the binary ones."""
    standardized = balance.standardize(kernel)
    return standardized, balance.power_of_two_scale(standardized)


def _batch(labels: np.ndarray) -> Batch:
    return Batch(
        images=jnp.zeros((len(labels),)), labels=jnp.asarray(labels, jnp.int32), mask=jnp.ones(len(labels), bool)
    )


def check_losses(file: GoldenFile, result: Comparison) -> None:
    """The three terms of self-distillation without their weights, and their gradients."""
    for case in (match.group() for match in file.cases(r"feat\d+_")):
        _check_feature_loss(file, result, case, file[case + "tar"])
    for case in (match.group() for match in file.cases(r"feat_equal_")):
        target = file.get(case + "tar")
        # Operation by operation, equal maps take equal paths; fused, one may be rounded in another way.
        with jax.disable_jit():
            _check_feature_loss(file, result, case, file[case + "out"] if target is None else target)
    for case in (match.group() for match in file.cases(r"kl\d+_")):
        _check_label_loss(file, result, case)
    for case in (match.group() for match in file.cases(r"clus\d+_")):
        _check_cluster_loss(file, result, case)


def _compare_loss(
    result: Comparison, case: str, names: tuple[str, str], value: Any, gradient: Any, file: GoldenFile
) -> None:
    """1e-5 of the loss and of the largest gradient; exactly 0 where the file has 0."""
    loss, derivative = (case + name for name in names)
    result.close(loss, value, file[loss], rtol=1e-5)
    relative_to_largest(result, derivative, gradient, file[derivative], rtol=1e-5)


def _check_feature_loss(file: GoldenFile, result: Comparison, case: str, target: np.ndarray) -> None:
    term, batch, logits = FeatureSwap(), _batch(np.zeros(len(target))), jnp.zeros((len(target), 1))

    def loss(feature):
        outputs = Outputs(logits=logits, features=logits, block_features=(feature,), real_features=(nhwc(target),))
        return term(outputs, batch, {}, QuantContext(train=True))

    value, gradient = jax.jit(jax.value_and_grad(loss))(nhwc(file[case + "out"]))
    _compare_loss(result, case, ("loss", "dout"), value, nchw(gradient), file)


def _check_label_loss(file: GoldenFile, result: Comparison, case: str) -> None:
    """The stored rows are gathered already: they are a bank with a class for each image."""
    rows, term = file[case + "bankrows"], LabelBank(temperature=float(file[case + "T"]))
    batch, state = _batch(np.arange(len(rows))), bank_state(rows)

    def loss(logits):
        return term(Outputs(logits=logits, features=logits), batch, state, QuantContext(train=True))

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(file[case + "logits"]))
    _compare_loss(result, case, ("loss", "dlogits"), value, gradient, file)


def _check_cluster_loss(file: GoldenFile, result: Comparison, case: str) -> None:
    points, batch, classes = jnp.asarray(file[case + "penult"]), _batch(file[case + "labels"]), int(file[case + "C"])
    logits = jnp.zeros((len(points), classes))

    def loss(points):
        return Cluster()(Outputs(logits=logits, features=points), batch, {}, QuantContext(train=True))

    value, gradient = jax.jit(jax.value_and_grad(loss))(points)
    _compare_loss(result, case, ("loss", "dpenult"), value, gradient, file)
    centres = class_means(points, batch, num_classes=classes)[batch.labels]
    relative_to_largest(result, case + "centers_gathered", centres, file[case + "centers_gathered"], rtol=1e-5)


def check_label_bank(file: GoldenFile, result: Comparison) -> None:
    """Sums and counts of single batches, and the bank of an epoch of several."""
    for case in (match.group() for match in file.cases(r"b\d+_")):
        logits, labels = file[case + "logits"], file[case + "labels"]
        state = _after_batches(LabelBank(), logits.shape[1], [(logits, labels)])
        relative_to_largest(result, case + "sum_top1", state["sum"], file[case + "sum_top1"], rtol=1e-5)
        result.exact(case + "count_top1", state["count"], file[case + "count_top1"])
        # Without the filter the sum is the mean of the class times its number of images.
        means = class_means(jnp.asarray(logits), _batch(labels), num_classes=logits.shape[1])
        count = np.bincount(labels, minlength=logits.shape[1])
        relative_to_largest(result, case + "sum_all", means * count[:, None], file[case + "sum_all"], rtol=1e-5)
        result.exact(case + "count_all", count, file[case + "count_all"])
    batches = [(file[match.group()], file[f"{match.group(1)}labels"]) for match in file.cases(r"(ep_batch\d+_)logits$")]
    if batches:
        _check_bank_of_an_epoch(file, result, batches)


def _after_batches(term: LabelBank, classes: int, batches: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, jax.Array]:
    """The bank's state after steps with these logits and labels."""
    state = term.init(classes)
    for logits, labels in batches:
        outputs = Outputs(logits=jnp.asarray(logits), features=jnp.asarray(logits))
        state = term.after_step(outputs, _batch(labels), state)
    return state


def _check_bank_of_an_epoch(file: GoldenFile, result: Comparison, batches: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """As released, a class never right has a NaN row; by default it keeps its row, here the zeros it began with."""
    expected = file["ep_bank"]
    right = ~np.isnan(expected)
    for term in (LabelBank(strict_release=True), LabelBank()):
        state = _after_batches(term, len(expected), batches)
        result.exact("ep_count", state["count"], file["ep_count"])
        bank = np.asarray(term.after_epoch(state)["bank"])
        result.close("ep_bank", bank, expected, atol=1e-5, where=right)
        rest = np.isnan(bank) if term.strict_release else bank == 0
        result.require(f"ep_bank, rows of classes never right: {term}", bool(rest[~right].all()))


def check_released_label_banks(file: GoldenFile, result: Comparison) -> None:
    """The shipped banks: a row per class, its largest entry in the class's own column."""
    for name in file:
        bank = file[name]
        result.exact(f"{name} is square", bank.shape[0], bank.shape[1])
        result.exact(f"{name}, largest of each row", bank.argmax(axis=1), np.arange(len(bank)))


class TwoInputs(nn.Module):
    """A block as a network whose streams begin with different inputs: ``images`` is (binary, real).

    Attributes:
      block: Linen module (x, context) -> y.
    """

    block: nn.Module

    @nn.compact
    def __call__(self, images: tuple[jax.Array, jax.Array], ctx: QuantContext) -> NetworkOutput:
        y = self.block(images[1] if ctx.stream == "real" else images[0], ctx)
        return NetworkOutput(logits=y, features=y)


def both_streams(
    module: nn.Module, variables: Mapping[str, Any], images: tuple[jax.Array, jax.Array], ctx: QuantContext
) -> tuple[Outputs, dict[str, Any]]:
    """The training step's forward pass of both streams, with any module in place of the network."""
    parts: Any = StepParts(
        network=TwoInputs(module),
        objectives=(FeatureSwap(),),
        optimizer=None,  # type: ignore[arg-type]
        prepare=lambda images, key: images,
    )
    inside = {name: {"block": collection} for name, collection in variables.items() if collection}
    outputs, updates = forward(parts, inside, images, ctx, key=jax.random.key(0))  # type: ignore[arg-type]
    return outputs, {name: collection["block"] for name, collection in updates.items()}


def check_blocks(file: GoldenFile, result: Comparison) -> None:
    """Residual blocks of the three ResNets: both streams, gradients, running statistics, in both modes."""
    for name in map(str, file["names"]):
        kind, case = name.partition("_")[0], f"{name}/"
        state = file.group(f"{case}param/")
        features, stride = state["conv1.weight"].shape[0], int(file[case + "stride"])
        layers = networks.build(spec("hardtanh_resnet20"), IRNET, num_classes=2).layers
        block = BLOCKS[BLOCK_OF[kind]](features=features, stride=stride, layers=layers)
        knobs = knobs_of(file[case + "k"], file[case + "t"])
        compare_estimator(result, case, file, epoch=int(file[case + "epoch_of_700"]), epochs=700)
        for mode in ("train", "eval"):
            ctx = QuantContext(train=mode == "train", knobs=knobs)
            _check_block(file, result, case, f"{case}{mode}/", block, state, ctx)


def _check_block(
    file: GoldenFile,
    result: Comparison,
    case: str,
    mode: str,
    block: nn.Module,
    state: dict[str, np.ndarray],
    ctx: QuantContext,
) -> None:
    x, real = nhwc(file[case + "x"]), nhwc(file[case + "realx"])
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, ctx), x)
    variables = pytorch.import_state(state, shapes)

    def run(params, x):
        outputs, updates = both_streams(block, {**variables, "params": params}, (x, real), ctx)
        return outputs.block_features, (outputs, updates)

    # Without jit: single operations are compiled once for all cases.
    _, pullback, (outputs, updates) = jax.vjp(run, variables["params"], x, has_aux=True)
    gradients, dx = pullback((nhwc(file[case + "g_bin1"]), nhwc(file[case + "g_bin2"])))
    pairs = list(zip(outputs.block_features, outputs.real_features, strict=True))
    result.exact(mode + "pairs", len(pairs), 2)
    for number, (binary, real_feature) in enumerate(pairs, start=1):
        result.close(f"{mode}bin{number}", nchw(binary), file[f"{mode}bin{number}"], atol=1e-5)
        result.close(f"{mode}real{number}", nchw(real_feature), file[f"{mode}real{number}"], atol=1e-5)
    losses = [channel_and_spatial_distance(*pair, jnp.ones(len(x), bool)) for pair in pairs]
    result.close(mode + "featloss", losses, file[mode + "featloss"], atol=1e-5)
    relative_to_largest(result, mode + "dx", nchw(dx), file[mode + "dx"], rtol=1e-4)
    compare_gradients(result, f"{mode}grad/", gradients, file.group(f"{mode}grad/"), rtol=1e-4)
    statistics = file.group(f"{mode}buffer_after/")
    after = in_pytorch_form(updates, state)
    for name in (name for name in state if name.rpartition(".")[2] in ("running_mean", "running_var")):
        # In evaluation nothing is stored and nothing may change.
        tolerance = 1e-5 if ctx.train else 0.0
        result.close(
            f"{mode}buffer_after/{name}", after[name], statistics.get(name, state[name]), rtol=tolerance, atol=tolerance
        )


def check_vgg_stage_pool_ties(file: GoldenFile, result: Comparison) -> None:
    """Convolution, pooling of integers with many ties, BatchNorm, clip; and the gradient of the pooling alone."""
    w, x = file["w"], nhwc(file["x"])
    ctx = QuantContext(train=True, knobs=knobs_of(file["k"], file["t"]))
    conv = QuantConv(w.shape[0], weight_quantizer=build_weight(IRNET.weight), act_quantizer=build_act(IRNET.act))
    channels = np.ones(w.shape[0], np.float32)
    statistics = {"batch_stats": {"mean": 0 * channels, "var": channels}}

    def stage(x, kernel, scale, bias):
        y, taps = conv.apply({"params": {"kernel": kernel}}, x, ctx, mutable=["taps"])
        real = conv.apply({"params": {"kernel": kernel}, **taps}, x, ctx.replace(stream="real"))
        affine = {"params": {"scale": scale, "bias": bias}, **statistics}
        normalised, _ = BatchNorm().apply(affine, pooled(y), ctx, mutable=["batch_stats"])
        return hard_tanh(normalised), (y, real)

    out, pullback, (y, real) = jax.vjp(stage, x, to_ours(w), channels, 0 * channels, has_aux=True)
    result.exact("conv_out", nchw(y), file["conv_out"])
    relative_to_largest(result, "real_conv_out", nchw(real), file["real_conv_out"], rtol=1e-4)
    relative_to_largest(result, "stage_out", nchw(out), file["stage_out"], rtol=1e-4)
    dx, dw, dgamma, dbeta = pullback(nhwc(file["g_stage"]))
    for name, own in {"dx": nchw(dx), "dw": to_pytorch(dw), "dgamma": dgamma, "dbeta": dbeta}.items():
        relative_to_largest(result, name, own, file[name], rtol=1e-4)
    _, (din,) = value_and_pullback(pooled, (nhwc(file["conv_out"]),), nhwc(file["pool_g"]))
    result.exact("pool_din", nchw(din), file["pool_din"])


def pooled(x: jax.Array) -> jax.Array:
    """The 2x2 maximum, as VGG-Small takes it."""
    return nn.max_pool(x, (2, 2), strides=(2, 2))


PARTS: dict[str, Callable[[GoldenFile, Comparison], None]] = {
    "binarize_and_schedules": check_binarize_and_schedules,
    "skd_conv": check_skd_conv,
    "losses": check_losses,
    "label_bank": check_label_bank,
    "released_label_banks": check_released_label_banks,
    "blocks": check_blocks,
    "vgg_stage_pool_ties": check_vgg_stage_pool_ties,
}
