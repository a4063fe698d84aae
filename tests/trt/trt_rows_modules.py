"""Rows of torch.nn's modules."""

from torch import nn
from trt_rows import IMAGE, SEQUENCE, Make, X, f, ints, module

module("nn.Linear", lambda: nn.Linear(6, 5), X)
module("nn.Bilinear", lambda: nn.Bilinear(4, 3, 5), f("B", 4), f("B", 3))
module("nn.Conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), SEQUENCE)
module("nn.Conv1d(reflect)", lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), SEQUENCE)
module("nn.Conv1d(depthwise)", lambda: nn.Conv1d(4, 4, 5, padding=2, groups=4), SEQUENCE)
module("nn.Conv2d", lambda: nn.Conv2d(4, 6, 3, 2), IMAGE)
module("nn.Conv3d", lambda: nn.Conv3d(2, 3, 2), f("B", 2, "T", 5, 4))
module("nn.ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), SEQUENCE)
module("nn.ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 6, 3, 2, dilation=2), IMAGE)
module("nn.ConvTranspose3d", lambda: nn.ConvTranspose3d(2, 3, 2), f("B", 2, "T", 3, 4))
module("nn.BatchNorm1d", lambda: nn.BatchNorm1d(4), SEQUENCE)
module("nn.BatchNorm1d(2d)", lambda: nn.BatchNorm1d(6), f("B", 6))
module("nn.BatchNorm2d", lambda: nn.BatchNorm2d(4), IMAGE)
module("nn.BatchNorm3d", lambda: nn.BatchNorm3d(2), f("B", 2, "T", 3, 4))
module("nn.LayerNorm", lambda: nn.LayerNorm(6), X)
module("nn.LayerNorm(2d)", lambda: nn.LayerNorm((3, 6)), f("B", 3, 6))
module("nn.RMSNorm", lambda: nn.RMSNorm(6), X)
module("nn.GroupNorm", lambda: nn.GroupNorm(2, 4), IMAGE)
module("nn.InstanceNorm1d", lambda: nn.InstanceNorm1d(4, affine=True), SEQUENCE)
module("nn.InstanceNorm2d", lambda: nn.InstanceNorm2d(4), IMAGE)
module("nn.LocalResponseNorm", lambda: nn.LocalResponseNorm(2), IMAGE)
module("nn.Embedding", lambda: nn.Embedding(9, 4, padding_idx=0), ints(0, 9, "B", "T"))
module("nn.Embedding(int32)", lambda: nn.Embedding(9, 4), ints(0, 9, "B", "T", dtype="int32"))
NAMES = """ReLU ReLU6 ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh LeakyReLU Softsign Softplus LogSigmoid
    Tanhshrink Softshrink Hardshrink Sigmoid Tanh GLU PReLU RReLU Identity Flatten Dropout AlphaDropout"""
for name in NAMES.split():
    module(f"nn.{name}", getattr(nn, name), X)
module("nn.PReLU(channels)", lambda: nn.PReLU(4), IMAGE)
module("nn.Threshold", lambda: nn.Threshold(0.1, 5.0), X)
module("nn.Softmax", lambda: nn.Softmax(-1), X)
module("nn.LogSoftmax", lambda: nn.LogSoftmax(-1), X)
module("nn.Softmin", lambda: nn.Softmin(-1), X)
module("nn.Softmax2d", nn.Softmax2d, IMAGE)
module("nn.MaxPool1d", lambda: nn.MaxPool1d(3, 2), SEQUENCE)
module("nn.MaxPool2d", lambda: nn.MaxPool2d(3, 2, 1), IMAGE)
module("nn.AvgPool1d", lambda: nn.AvgPool1d(2), SEQUENCE)
module("nn.AvgPool2d", lambda: nn.AvgPool2d(2, padding=1), IMAGE)
module("nn.AdaptiveAvgPool1d", lambda: nn.AdaptiveAvgPool1d(4), SEQUENCE)
module("nn.AdaptiveAvgPool2d", lambda: nn.AdaptiveAvgPool2d(1), IMAGE)
module("nn.AdaptiveMaxPool2d", lambda: nn.AdaptiveMaxPool2d(1), IMAGE)
module("nn.ZeroPad2d", lambda: nn.ZeroPad2d((1, 2, 0, 1)), IMAGE)
module("nn.ConstantPad1d", lambda: nn.ConstantPad1d(2, 1.5), SEQUENCE)
module("nn.ReflectionPad1d", lambda: nn.ReflectionPad1d(2), SEQUENCE)
module("nn.ReflectionPad2d", lambda: nn.ReflectionPad2d((1, 2, 1, 0)), IMAGE)
module("nn.ReplicationPad2d", lambda: nn.ReplicationPad2d(2), IMAGE)
module("nn.CircularPad1d", lambda: nn.CircularPad1d(2), SEQUENCE)
module("nn.PixelShuffle", lambda: nn.PixelShuffle(2), IMAGE)
module("nn.PixelUnshuffle", lambda: nn.PixelUnshuffle(3), f("B", 2, 6, 9))
module("nn.ChannelShuffle", lambda: nn.ChannelShuffle(2), IMAGE)
module("nn.Upsample", lambda: nn.Upsample(scale_factor=2), IMAGE)
module("nn.Upsample(bilinear)", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE)
module("nn.UpsamplingNearest2d", lambda: nn.UpsamplingNearest2d(scale_factor=3), IMAGE)
module("nn.Unflatten", lambda: nn.Unflatten(2, (2, 3)), X)
module("nn.Unfold", lambda: nn.Unfold(2), f("B", 2, 5, 6))
module("nn.CosineSimilarity", lambda: nn.CosineSimilarity(-1), X, X)


class SelfAttention(nn.Module):
    def __init__(self, batch_first=True, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options)

    def forward(self, x, mask=None):
        return self.attention(x, x, x, key_padding_mask=mask)


module("nn.MultiheadAttention", SelfAttention, X)
module("nn.MultiheadAttention(mask)", SelfAttention, X, Make("B", "T", dtype="bool"))
module("nn.MultiheadAttention(bias_kv)", lambda: SelfAttention(add_bias_kv=True), X)
module("nn.MultiheadAttention(time first)", lambda: SelfAttention(False), f("T", "B", 6))
module("nn.TransformerEncoderLayer", lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), X)
module(
    "nn.TransformerEncoderLayer(pre)",
    lambda: nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, norm_first=True),
    X,
)
module(
    "nn.TransformerEncoder",
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2),
    X,
)
module("nn.TransformerDecoderLayer", lambda: nn.TransformerDecoderLayer(6, 2, 12, batch_first=True), X, f("B", 5, 6))
module("nn.LSTM", lambda: nn.LSTM(6, 4, 2, batch_first=True), X)
module("nn.LSTM(bidirectional)", lambda: nn.LSTM(6, 4, bidirectional=True), X)
module("nn.GRU", lambda: nn.GRU(6, 4, 2, batch_first=True, bidirectional=True), X)
module("nn.RNN", lambda: nn.RNN(6, 4, batch_first=True), X)
module("nn.RNN(relu)", lambda: nn.RNN(6, 4, nonlinearity="relu", bias=False), X)
module("nn.LSTMCell", lambda: nn.LSTMCell(6, 4), f("B", 6))
module("nn.GRUCell", lambda: nn.GRUCell(6, 4), f("B", 6))
module("nn.Sequential", lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5)), X)
