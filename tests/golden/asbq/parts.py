"""Checks of quantizers, masks, one convolution, the losses and residual blocks."""

from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from bnn_jax import networks
from bnn_jax.layers import QuantConv
from bnn_jax.networks.blocks import BLOCKS
from bnn_jax.objectives import Batch, Outputs
from bnn_jax.ops import pruning, ste
from bnn_jax.quantizers import QuantContext, build_act, build_weight
from bnn_jax.stages import spec
from bnn_jax.storage import pytorch
from tests.golden.asbq.support import (
    PRUNED_SHARE,
    act_spec,
    bit_widths,
    full_masks,
    gradient_tolerance,
    in_pytorch_form,
    loss_terms,
    nchw,
    nhwc,
    quant_spec,
    to_ours,
    to_pytorch,
    value_and_pullback,
    weight_spec,
)
from tests.golden.comparison import Comparison, GoldenFile


def check_weight_quantizer(file: GoldenFile, result: Comparison) -> None:
    """Forward where no rounding argument lies on a tie, gradient everywhere, the box filter a masked one becomes."""
    for case in (match.group(1) for match in file.cases(r"(.+?)/x$")):
        x = file[f"{case}/x"]
        masked = np.all(x == 0, axis=(1, 2, 3))
        for bits in bit_widths((name.removeprefix(f"{case}/") for name in file), r"q(\d+)$"):
            quantizer = build_weight(weight_spec(bits, masked=False))()
            value, (gradient,) = value_and_pullback(
                lambda w, quantizer=quantizer: quantizer.apply({}, w, QuantContext()),
                (to_ours(x),),
                to_ours(file[f"{case}/cot"]),
            )
            q, margin = to_pytorch(value), file.get(f"{case}/margin{bits}")
            clear = np.ones(x.shape, bool) if margin is None else margin > 1e-4
            result.close(f"{case}/q{bits}", q, file[f"{case}/q{bits}"], atol=3e-6, where=clear)
            result.close(f"{case}/g{bits}", to_pytorch(gradient), file[f"{case}/g{bits}"], atol=1e-6)
            if 2 <= bits <= 8 and masked.any():
                box = np.tanh(np.abs(x).max()) / (2**bits - 1)
                result.close(f"{case}/q{bits} of zero filters", q[masked], np.full(q[masked].shape, box), atol=3e-6)


def check_activation_quantizer(file: GoldenFile, result: Comparison) -> None:
    """quant(relu6(u)); the gradient at exactly 0 and 1 is a convention of the framework's version."""
    u = file["u"]
    for bits in bit_widths(file, r"q(\d+)$"):
        quantizer = build_act(act_spec(bits))()

        def forward(u, quantizer=quantizer):
            return quantizer.apply({}, ste.relu6(u), QuantContext())

        value, (gradient,) = value_and_pullback(forward, (nhwc(u),), nhwc(file["cot"]))
        margin = file.get(f"margin{bits}")
        clear = np.ones(u.shape, bool) if margin is None else margin > 1e-4
        result.close(f"q{bits}", nchw(value), file[f"q{bits}"], atol=1e-6, where=clear)
        result.close(f"g{bits}", nchw(gradient), file[f"g{bits}"], atol=1e-6, where=(u != 0) & (u != 1))


def check_conv_q(file: GoldenFile, result: Comparison) -> None:
    """One quantized, masked convolution: output, quantized weight, both gradients, and the mask's rule."""
    for match in file.cases(r"[^/]*_w(\d+)_k(\d+)s(\d+)/"):
        case, (bits, size, stride) = match.group(), map(int, match.groups())
        weight, mask, x = (file[case + name] for name in ("weight_orig", "mask", "x"))
        quantizer = build_weight(weight_spec(bits, masked=True))
        conv = QuantConv(
            features=weight.shape[0],
            kernel_size=(size, size),
            strides=(stride, stride),
            padding=((size // 2,) * 2,) * 2,
            groups=x.shape[1] // weight.shape[1],
            weight_quantizer=quantizer,
        )
        flat = pytorch.convert_names({"weight_orig": weight, "weight_mask": mask})
        variables = flax.traverse_util.unflatten_dict(flat, sep="/")

        def forward(x, params, conv=conv, state=variables["quant_state"]):
            return conv.apply({"params": params, "quant_state": state}, x, QuantContext())

        y, pullback = jax.vjp(forward, nhwc(x), variables["params"])
        gx, gw = pullback(nhwc(file[case + "cot"]))
        quantized = quantizer().apply({"quant_state": {"mask": to_ours(mask)}}, to_ours(weight), QuantContext())
        own = {"y": nchw(y), "gx": nchw(gx), "gw": to_pytorch(gw["kernel"]), "wq": to_pytorch(quantized)}
        for name, value in own.items():
            result.close(case + name, value, file[case + name], atol=2e-5)
        result.exact(case + "mask", to_pytorch(pruning.filter_mask(to_ours(weight), PRUNED_SHARE)), mask)


def check_masks(file: GoldenFile, result: Comparison) -> None:
    """Which filters, and which 1x2 blocks, are masked."""
    for case in (match.group(1) for match in file.cases(r"(.+?)/w$")):
        kernel = to_ours(file[f"{case}/w"])
        if f"{case}/keep" in file:
            mask = np.asarray(pruning.filter_mask(kernel, PRUNED_SHARE))
            result.exact(f"{case}/keep", mask, np.broadcast_to(file[f"{case}/keep"], mask.shape))
        else:
            mask = pruning.row_block_mask(kernel, PRUNED_SHARE)
            result.exact(f"{case}/mask", to_pytorch(mask), file[f"{case}/mask"])


def check_loss(file: GoldenFile, result: Comparison) -> None:
    """Cross-entropy, distillation, their weighted sum and its gradient, for every temperature, weight and reduction."""
    student, teacher = jnp.asarray(file["student"]), jnp.asarray(file["teacher"])
    labels = jnp.asarray(file["labels"], jnp.int32)
    batch = Batch(images=student, labels=labels, mask=jnp.ones(labels.shape, bool))
    for match in file.cases(r"T([^_/]+)_lam([^_/]+)_(mean|batchmean)/"):
        case, temperature, weight = match.group(), float(match.group(1)), float(match.group(2))
        terms = loss_terms(weight=weight, temperature=temperature, reduction=match.group(3))

        def loss(logits, terms=terms):
            outputs = Outputs(logits=logits, features=logits, teacher_logits=teacher)
            values = [term(outputs, batch, {}, QuantContext(train=True)) for term in terms]
            return sum(term.weight * value for term, value in zip(terms, values)), values

        (total, (ce, kd)), gradient = jax.value_and_grad(loss, has_aux=True)(student)
        for name, value in {"ce": ce, "kd": kd, "grad": gradient}.items():
            result.close(case + name, value, file[case + name], rtol=2e-6, atol=1e-6)
        result.close(case + "loss", total, file[case + "loss"], rtol=1e-5, atol=1e-6)


def check_blocks(file: GoldenFile, result: Comparison) -> None:
    """Residual blocks of each kind: output, all gradients, running statistics after one training forward."""
    for match in file.cases(r"[^/]*?_([a-z]+)_k(\d+)_(\d+)to(\d+)s(\d+)_(train|eval)/"):
        kind, mode = match.group(1), match.group(6)
        bits, _, features, stride = map(int, match.groups()[1:5])
        _check_block(file, result, match.group(), _block(kind, bits, features, stride), training=mode == "train")


def _block(kind: str, bits: int, features: int, stride: int) -> Any:
    """A residual block with the layer factories of a network around it."""
    network = networks.build(spec("resnet8", block=kind), quant_spec(bits), num_classes=2)
    return BLOCKS[kind](features=features, stride=stride, layers=network.layers)


def _check_block(file: GoldenFile, result: Comparison, case: str, block: Any, *, training: bool) -> None:
    inputs = file.group(case + "in/")
    keep = {name.removesuffix(".keep"): inputs.pop(name) for name in list(inputs) if name.endswith(".keep")}
    x, ctx = nhwc(file[case + "x"]), QuantContext(train=training)
    shapes = jax.eval_shape(lambda x: block.init(jax.random.key(0), x, ctx), x)
    variables = pytorch.import_state({**inputs, **full_masks(keep, inputs)}, shapes)

    def forward(params, x):
        return block.apply({**variables, "params": params}, x, ctx, mutable=["batch_stats"])

    # Without jit: the dozens of cases share the compiled single operations, which is three times as fast as compiling
    # each case. Whole networks and training steps run compiled.
    y, pullback, updates = jax.vjp(forward, variables["params"], x, has_aux=True)
    gradients, gx = pullback(nhwc(file[case + "cot"]))
    result.close(case + "y", nchw(y), file[case + "y"], atol=1e-4)
    result.close(case + "gx", nchw(gx), file[case + "gx"], atol=gradient_tolerance(file[case + "gx"]))
    expected = file.group(case + "grad/")
    own = in_pytorch_form({"params": gradients}, expected)
    result.exact(case + "parameters with a gradient", sorted(own), sorted(expected))
    for name, value in own.items():
        result.close(f"{case}grad/{name}", value, expected[name], atol=gradient_tolerance(expected[name]))
    absent = {name: value for name, value in inputs.items() if name not in expected}
    for name, value in in_pytorch_form({"params": gradients}, absent).items():
        result.exact(f"{case}no gradient of {name}", value, np.zeros_like(value))
    statistics = file.group(case + "out/")
    for name, value in in_pytorch_form(updates, inputs).items():
        # In evaluation nothing is stored and nothing may change.
        reference = statistics.get(name, inputs[name])
        result.close(f"{case}out/{name}", value, reference, atol=1e-4 if name in statistics else 0.0)
