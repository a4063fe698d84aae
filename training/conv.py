"""The convolution module as it is trained: products and shifted sums instead of convolutions.

The same numbers from the same parameters (a test compares them). Frames stay ahead of channels, so nothing is
transposed, and torch.compile makes one graph for every length, which it does not for the gradient of a convolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from m3asr.model import ConvModule, Model


class TrainedConv(ConvModule):
    """ConvModule with layer norm, without a cache; `install` makes them."""

    def forward(self, x: Tensor, frames: Tensor, glu_frames: Tensor, cache=None) -> Tensor:
        kernel, size = self.depthwise_conv.weight.shape[-1], x.shape[1]
        x = x.masked_fill(~frames.unsqueeze(-1), 0.0)  # (B, S, D)
        if self.left_padding:
            x = F.pad(x, (0, 0, self.left_padding, 0))
        x = F.glu(F.linear(x, self.pointwise_conv1.weight.squeeze(-1), self.pointwise_conv1.bias), dim=-1)
        if not self.left_padding:
            around = (kernel - 1) // 2
            x = F.pad(x.masked_fill(~glu_frames.unsqueeze(-1), 0.0), (0, 0, around, around))
        weight = self.depthwise_conv.weight.squeeze(1)  # (D, kernel)
        y = self.depthwise_conv.bias + x[:, :size] * weight[:, 0]
        for i in range(1, kernel):
            y = y + x[:, i : i + size] * weight[:, i]
        y = self.activation(self.norm(y))
        y = F.linear(y, self.pointwise_conv2.weight.squeeze(-1), self.pointwise_conv2.bias)
        return y.masked_fill(~frames.unsqueeze(-1), 0.0)


def install(model: Model) -> None:
    for module in model.modules():
        if isinstance(module, ConvModule) and module.use_layer_norm:
            module.__class__ = TrainedConv
