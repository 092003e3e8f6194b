"""The training step of the same networks in PyTorch, for ``train_step.py --against=pytorch``; needs PyTorch.

ASBQ's pre-activation ResNets and its VGG-Small with DoReFa quantizers, written as one writes them in PyTorch, and SGD
with momentum; each in PyTorch's default layout and with channels last.
"""

import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        steps = 2**bits - 1
        ctx.save_for_backward((x > 0) & (x < 1))
        clipped = x.clamp(0, 1)
        return (clipped + 0.5).floor_() if bits == 1 else (clipped * steps).round_() / steps

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * ctx.saved_tensors[0], None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, bits: int) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if bits == 1:
            ctx.save_for_backward()
            return torch.where(w >= 0, 1.0, -1.0) * w.abs().mean()
        squashed = w.tanh()
        ctx.save_for_backward(1 - squashed * squashed)
        highest, steps = squashed.abs().max(), 2**bits - 1
        return highest * (2 * ((squashed / 2 / highest + 0.5) * steps).round() / steps - 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * ctx.saved_tensors[0] if ctx.saved_tensors else gradients[0], None


class QuantConv(nn.Conv2d):
    """3x3 convolution of quantized activations with quantized weights."""

    def __init__(self, num_in: int, num_out: int, bits: int, stride: int = 1):
        super().__init__(num_in, num_out, 3, stride, 1, bias=False)
        self.bits = bits

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.bits == 32:
            return super().forward(input)
        x, weight = _Activation.apply(input, self.bits), _Weight.apply(self.weight, self.bits)
        return functional.conv2d(x, weight, None, self.stride, self.padding)  # pyright: ignore[reportArgumentType]


class Block(nn.Module):
    """BatchNorm, ReLU6, quantizer, convolution, twice, and a shortcut."""

    def __init__(self, num_in: int, num_out: int, bits: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(num_in), QuantConv(num_in, num_out, bits, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(num_out), QuantConv(num_out, num_out, bits)
        changes = stride != 1 or num_in != num_out
        down = (nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))
        self.shortcut = nn.Sequential(*down) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(functional.relu6(self.bn1(x)))
        return self.conv2(functional.relu6(self.bn2(h))) + self.shortcut(x)


def resnet(stage_sizes: tuple[int, ...], widths: tuple[int, ...], bits: int) -> nn.Module:
    """The network that ``networks.resnet.CifarResNet`` is, for 10 classes."""
    parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1, bias=False)]
    before = widths[0]
    for stage, (size, width) in enumerate(zip(stage_sizes, widths)):
        for index in range(size):
            parts.append(Block(before, width, bits, 2 if stage and not index else 1))
            before = width
    tail = (nn.BatchNorm2d(before), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    return nn.Sequential(*parts, *tail)


def vgg_small(widths: tuple[int, ...], bits: int, side: int = 32) -> nn.Module:
    """The network that ``networks.vgg_small.VggSmall`` is, for 10 classes."""
    parts: list[nn.Module] = []
    for index, (before, width) in enumerate(zip((3, *widths), widths)):
        parts.append(QuantConv(before, width, bits) if index else nn.Conv2d(3, width, 3, padding=1, bias=False))
        parts += [nn.MaxPool2d(2)] if index % 2 else []
        parts += [nn.BatchNorm2d(width), nn.ReLU6()]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(widths[-1] * (side // 8) ** 2, 10))


class PytorchSide:
    """Forward, backward and optimiser on one fixed batch.

    Args:
      network: one of ours, that says which one is to be made.
      bits: width of weights and activations.
      batch_size: images.
      channels_last: whether images and weights lie channels last.
    """

    def __init__(self, network: Any, bits: int, batch_size: int, *, channels_last: bool):
        torch.manual_seed(0)
        widths = tuple(network.widths)
        sizes = getattr(network, "stage_sizes", None)
        made = vgg_small(widths, bits) if sizes is None else resnet(tuple(sizes), widths, bits)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network = made.train().to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        self.images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=layout)
        self.labels = torch.arange(batch_size) % 10
        self.optimizer = torch.optim.SGD(made.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def run(self, steps: int) -> float:
        """Seconds of ``steps`` steps."""
        started = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(self.network(self.images), self.labels).backward()
            self.optimizer.step()
        return time.perf_counter() - started
