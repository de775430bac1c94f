"""Small networks in the styles that people write, with statistics as of some training. Nothing in here knows of qatana."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FunctionalBlock(nn.Module):
    """F.relu, in-place addition, 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class FunctionalResNet(nn.Module):
    """Functional style: a pooling window as large as the map, `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block1, self.block2 = FunctionalBlock(8, 8, 1), FunctionalBlock(8, 16, 2)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = self.block2(self.block1(x))
        x = F.avg_pool2d(x, x.size(3))
        return self.linear(x.view(x.size(0), -1))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and one shared in-place ReLU module, torch.add."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(torch.add(out, identity))


class BottleneckResNet(nn.Module):
    """ResNet-50 style: strided 7x7 stem, max pool, stages in nn.Sequential, adaptive pool, torch.flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Bottleneck(8, 4, 1), Bottleneck(16, 4, 1))
        self.layer2 = nn.Sequential(Bottleneck(16, 8, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class MixedNet(nn.Module):
    """Bias and no norm, a norm without affine parameters, depthwise, grouped and dilated, "same" padding, methods, mean([2, 3])."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding="same")
        self.depthwise, self.plain = (
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8, affine=False),
        )
        self.grouped, self.norm = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2), nn.BatchNorm2d(12)
        self.odd = nn.Conv2d(12, 12, (1, 3), stride=(1, 2), padding=(0, 1))
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.plain(self.depthwise(x)).add(x)
        x = torch.relu(self.norm(self.grouped(x)))
        x = self.odd(x) + self.odd_skip(x)
        return self.head(x.mean([2, 3]))

    def odd_skip(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, (1, 2))


class Net1d(nn.Module):
    """Convolutions over time: kernel 5, stride 2, depthwise, a residual, max pool, adaptive pool, squeeze."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(4, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False), nn.BatchNorm1d(8)
        self.pool, self.gap, self.head = nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + torch.relu(self.bn2(self.conv2(x)))
        return self.head(self.gap(self.pool(x)).squeeze(-1))


class ControlFlowNet(nn.Module):
    """A condition on a shape stops torch.fx; torch.export follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=False)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 0:
            x = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(x))
        out += x
        out = F.adaptive_avg_pool2d(self.relu(out), 1)
        return self.fc(out.flatten(1))


class PreActivationBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out + x


class PreActivationResNet(nn.Module):
    """He et al. 2016 (v2): norm and ReLU before the convolution, so the first norm of a block cannot fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(PreActivationBlock(8), PreActivationBlock(8))
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv(x))))
        return self.fc(F.adaptive_avg_pool2d(x, (1, 1)).reshape(x.shape[0], -1))


@dataclass(frozen=True)
class Case:
    """A network, the shape of one of its inputs, and layers that the integer file may leave in float."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    channels_last: bool = False


CASES: dict[str, Case] = {
    "functional": Case(FunctionalResNet, (3, 8, 8)),
    "bottleneck": Case(BottleneckResNet, (3, 32, 32)),
    "mixed": Case(MixedNet, (3, 8, 8)),
    "1d": Case(Net1d, (4, 16)),
    "control-flow": Case(ControlFlowNet, (3, 8, 8)),
    "pre-activation": Case(PreActivationResNet, (3, 8, 8)),
    "channels-last": Case(FunctionalResNet, (3, 8, 8), channels_last=True),
}


def images(case: str, count: int, seed: int = 0) -> Tensor:
    """A batch of inputs of a case."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *CASES[case].shape, generator=draw)
    return x.contiguous(memory_format=torch.channels_last) if CASES[case].channels_last else x


def network(case: str, seed: int = 1) -> nn.Module:
    """A network in eval mode whose norms have statistics, weights and biases as of some training."""
    torch.manual_seed(seed)
    model = CASES[case].make()
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = None  # the average of all batches, as after a long training
        if norm.affine:
            nn.init.uniform_(norm.weight, -1.5, 1.5)  # negative factors too: training reaches them
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        for step in range(3):
            model(images(case, 16, seed=10 + step))
    for norm in norms:
        norm.momentum = 0.1
    if CASES[case].channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.eval()
