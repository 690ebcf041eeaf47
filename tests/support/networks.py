"""Provide small networks with the structure of those in torchvision and timm, and stand-ins for their layers."""

from collections import OrderedDict

import torch
from torch import nn


class BasicBlock(nn.Module):
    """A block as in torchvision, with a functional sum and one ReLU module that is used twice."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A ResNet-18 with a quarter of the width."""

    def __init__(self, width=16, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs, layers = width, []
        for stage in range(4):
            outputs = width << stage
            layers.append(nn.Sequential(BasicBlock(inputs, outputs, 1 + (stage > 0)), BasicBlock(outputs, outputs, 1)))
            inputs = outputs
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class InvertedResidual(nn.Module):
    """A block as in MobileNetV2: Sequential of convolution, norm and ReLU6, and a sum with no activation after it."""

    def __init__(self, inputs, outputs, stride, expand):
        super().__init__()
        hidden = inputs * expand
        layers = [conv_norm_act(inputs, hidden, 1)] if expand != 1 else []
        layers += [conv_norm_act(hidden, hidden, 3, stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


def conv_norm_act(inputs, outputs, size, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class MobileNet(nn.Module):
    """A MobileNetV2 with fewer blocks."""

    def __init__(self, classes=10):
        super().__init__()
        blocks = [conv_norm_act(3, 8, 3, 2), InvertedResidual(8, 8, 1, 1), InvertedResidual(8, 12, 2, 4)]
        blocks += [InvertedResidual(12, 12, 1, 4), InvertedResidual(12, 16, 2, 4), conv_norm_act(16, 32, 1)]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(32, classes))

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class UNet(nn.Module):
    """A U-Net with two levels, skip connections by concatenation, and a transposed convolution before a norm."""

    def __init__(self, width=8):
        super().__init__()
        self.down1, self.down2, self.bottom = twice(3, width), twice(width, 2 * width), twice(2 * width, 4 * width)
        self.up2, self.norm2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.BatchNorm2d(2 * width)
        self.up1, self.norm1 = nn.ConvTranspose2d(2 * width, width, 2, 2, bias=False), nn.BatchNorm2d(width)
        self.merge2, self.merge1 = twice(4 * width, 2 * width), twice(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(nn.functional.max_pool2d(a, 2))
        c = self.bottom(nn.functional.max_pool2d(b, 2))
        b = self.merge2(torch.cat([b, torch.relu(self.norm2(self.up2(c)))], 1))
        a = self.merge1(torch.cat([a, torch.relu(self.norm1(self.up1(b)))], 1))
        return self.head(a)


def twice(inputs, outputs):
    layers = OrderedDict()
    for i, channels in enumerate((inputs, outputs)):
        layers[f"conv{i}"] = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        layers[f"bn{i}"] = nn.BatchNorm2d(outputs)
        layers[f"act{i}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


class BatchNormAct2d(nn.BatchNorm2d):
    """A stand-in for the layer of timm."""

    def __init__(self, num_features, act, drop=None):
        super().__init__(num_features)
        self.drop = drop or nn.Identity()
        self.act = act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """A stand-in for the layer of torchvision."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        w, b, var, mean = (
            v.reshape(1, -1, 1, 1) for v in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


STAND_INS = {
    "timm.layers.norm_act.BatchNormAct2d": BatchNormAct2d,
    "torchvision.ops.misc.FrozenBatchNorm2d": FrozenBatchNorm2d,
}


def register(monkeypatch):
    """Let gpu_bn treat each stand-in as the class that it stands for."""
    from gpu_bn.nn.known_layers import CLASSES

    for name, cls in STAND_INS.items():
        monkeypatch.setitem(CLASSES, f"{cls.__module__}.{cls.__qualname__}", CLASSES[name])
