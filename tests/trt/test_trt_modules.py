"""Whole modules in the style of well-known projects: unmodified forwards, several sizes, one network each."""

import math

import pytest

pytest.importorskip("torch")
pytest.importorskip("tensorrt_rtx")

import torch
import torch.nn.functional as F
from torch import nn

import m3asr.trt as trt

RANGES = {"B": (1, 2, 8), "T": (8, 20, 200)}


class WhisperBlock(nn.Module):
    """Pre-norm attention with a key projection that has no bias, scaled on both sides, softmax in float."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.attn_ln, self.mlp_ln = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width * 4), nn.GELU(), nn.Linear(width * 4, width))

    def attention(self, x):
        n_batch, n_ctx, n_state = x.shape
        scale = (n_state // self.heads) ** -0.25
        q = self.query(x).view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3) * scale
        k = self.key(x).view(*x.shape[:2], self.heads, -1).permute(0, 2, 3, 1) * scale
        v = self.value(x).view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)
        w = F.softmax((q @ k).float(), dim=-1).to(q.dtype)
        return self.out((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))

    def forward(self, x):
        x = x + self.attention(self.attn_ln(x.float()).type(x.dtype))
        return x + self.mlp(self.mlp_ln(x))


class WhisperEncoder(nn.Module):
    def __init__(self, n_mels=10, n_ctx=100, width=16, heads=2, layers=2):
        super().__init__()
        self.conv1 = nn.Conv1d(n_mels, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.register_buffer("positional_embedding", torch.randn(n_ctx, width) * 0.1)
        self.blocks = nn.ModuleList(WhisperBlock(width, heads) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width)

    def forward(self, mel):
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).permute(0, 2, 1)
        x = (x + self.positional_embedding[: x.shape[1]]).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class BasicBlock(nn.Module):
    def __init__(self, planes_in, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(planes_in, planes, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.downsample = nn.Sequential(nn.Conv2d(planes_in, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.layers(self.stem(x))), 1))


class BertLayer(nn.Module):
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.word, self.position = nn.Embedding(50, width), nn.Embedding(200, width)
        self.register_buffer("position_ids", torch.arange(200).expand((1, -1)))
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-12) for _ in range(3))
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.intermediate, self.output = nn.Linear(width, 32), nn.Linear(32, width)
        self.dropout = nn.Dropout(0.1)

    def split(self, x):
        return x.view(x.size()[:-1] + (self.heads, self.size)).permute(0, 2, 1, 3)

    def forward(self, input_ids, attention_mask):
        seq_length = input_ids.size()[1]
        x = self.word(input_ids) + self.position(self.position_ids[:, :seq_length])
        x = self.dropout(self.norm0(x))
        mask = attention_mask[:, None, None, :].to(dtype=x.dtype)
        mask = (1.0 - mask) * torch.finfo(x.dtype).min
        scores = torch.matmul(self.split(self.query(x)), self.split(self.key(x)).transpose(-1, -2))
        weights = self.dropout(nn.functional.softmax(scores / math.sqrt(self.size) + mask, dim=-1))
        context = torch.matmul(weights, self.split(self.value(x))).permute(0, 2, 1, 3).contiguous()
        context = context.view(context.size()[:-2] + (self.heads * self.size,))
        x = self.norm1(self.dense(context) + x)
        return self.norm2(self.output(F.gelu(self.intermediate(x))) + x)


class LlamaBlock(nn.Module):
    """RMS norm with casts, rotary positions, grouped queries, gated feed-forward, causal mask."""

    def __init__(self, width=16, heads=4, groups=2):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, self.size, 2).float() / self.size)))

    def norm(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)

    def rotate(self, x, cos, sin):
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * cos + turned * sin

    def forward(self, x):
        batch, length, _ = x.shape
        positions = torch.arange(length, device=x.device).float()
        freqs = torch.outer(positions, self.inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        y = self.norm(x)
        q = self.q(y).view(batch, length, self.heads, self.size).transpose(1, 2)
        k = self.k(y).view(batch, length, self.groups, self.size).transpose(1, 2)
        v = self.v(y).view(batch, length, self.groups, self.size).transpose(1, 2)
        q, k = self.rotate(q, emb.cos(), emb.sin()), self.rotate(k, emb.cos(), emb.sin())
        k, v = (t[:, :, None].expand(batch, self.groups, 2, length, self.size).reshape(q.shape) for t in (k, v))
        mask = torch.full((length, length), float("-inf")).triu(1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(attended.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.silu(self.gate(self.norm(x))) * self.up(self.norm(x)))


class SpeechRnn(nn.Module):
    """Convolution, batch norm, two bidirectional GRUs with sequence mask and a linear head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, (3, 5), (2, 2), (1, 2)), nn.BatchNorm2d(4), nn.Hardtanh(0, 20))
        self.rnn = nn.GRU(20, 8, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 6)

    def forward(self, x, lengths):
        x = self.conv(x.unsqueeze(1))
        b, c, t, f = x.size()
        x = x.permute(0, 2, 1, 3).contiguous().view(b, t, c * f)
        x, _ = self.rnn(x)
        steps = torch.arange(t, device=x.device)[None, :]
        mask = steps >= torch.div(lengths + 1, 2, rounding_mode="floor")[:, None]
        return F.log_softmax(self.head(x).masked_fill(mask[..., None], 0.0), dim=-1)


class AtenCalls(nn.Module):
    """Operations called by their aten names, as converter projects write their tests."""

    def forward(self, x, y):
        x = torch.ops.aten.addmm(y, x, torch.ops.aten.t(x)[:, :1].expand(-1, 4).contiguous())
        x = torch.ops.aten.mean.dim(x, [1], True)
        x = torch.ops.aten.where.self(torch.ops.aten.gt.Scalar(x, 0.0), x, torch.ops.aten.mul.Scalar(x, 0.5))
        x = torch.ops.aten._softmax(torch.ops.aten.cat([x, y], 1), -1, False)
        return torch.ops.aten.native_layer_norm(x, [5], None, None, 1e-5)[0]


def text(b, t):
    mask = torch.ones(b, t, dtype=torch.int64)
    mask[0, t // 2 :] = 0
    return {"input_ids": torch.randint(0, 50, (b, t)), "attention_mask": mask}


CASES = {
    "whisper": (WhisperEncoder, {"mel": ("float32", ("B", 10, "T"))}, lambda b, t: {"mel": torch.randn(b, 10, t)}),
    "resnet": (ResNet, {"x": ("float32", ("B", 3, 32, "T"))}, lambda b, t: {"x": torch.randn(b, 3, 32, t)}),
    "bert": (BertLayer, {n: ("int64", ("B", "T")) for n in ("input_ids", "attention_mask")}, text),
    "llama": (LlamaBlock, {"x": ("float32", ("B", "T", 16))}, lambda b, t: {"x": torch.randn(b, t, 16)}),
    "rnn": (
        SpeechRnn,
        {"x": ("float32", ("B", "T", 10)), "lengths": ("int32", ("B",))},
        lambda b, t: {"x": torch.randn(b, t, 10), "lengths": torch.randint(1, t + 1, (b,), dtype=torch.int32)},
    ),
    "aten": (
        AtenCalls,
        {"x": ("float32", ("B", 4)), "y": ("float32", ("B", 4))},
        lambda b, t: {"x": torch.randn(b, 4), "y": torch.randn(b, 4)},
    ),
}


def made(name):
    make, inputs, values = CASES[name]
    torch.manual_seed(5)
    module = make().eval()
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return module, {n: trt.Input(*i) for n, i in inputs.items()}, values


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    module, inputs, values = made(name)
    network = trt.trace(module, inputs, RANGES)
    for sizes in ((1, 8), (3, 33), (2, 150)):
        given = values(*sizes)
        comparison = trt.compare(network, module, given)
        assert comparison.worst.error < 1e-4, comparison.worst
        assert comparison.not_finite is None or name == "llama"


@pytest.mark.parametrize("name", ["whisper", "resnet", "bert", "llama"])
@pytest.mark.parametrize("precision, tolerance", [("fp16", 2e-2), ("bf16", 8e-2)])
def test_low_precision(name, precision, tolerance):
    module, inputs, values = made(name)
    network = trt.trace(module, inputs, RANGES, precision=precision)
    assert trt.compare(network, module, values(2, 20)).rows[-1].error < tolerance


@pytest.mark.parametrize("name", ["whisper", "rnn"])
def test_really_built(name):
    module, inputs, _ = made(name)
    plan = trt.build(module, inputs, RANGES, precision="fp16" if name == "whisper" else "fp32")
    assert plan[:4] != b"" and len(plan) > 10000


def test_padding_leaves_the_encoder_as_zeros():
    """torch.nn.TransformerEncoder leaves padding out when it stands at the end, and computes it elsewhere."""
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    inputs = {"src": trt.Input("float32", ("B", "T", 8)), "src_key_padding_mask": trt.Input("bool", ("B", "T"))}
    network = trt.trace(module, inputs, {"B": (1, 2, 4), "T": (3, 5, 20)})
    x = torch.randn(2, 5, 8)
    at_the_end = torch.arange(5) >= torch.tensor([[3], [5]])
    for mask in (at_the_end, at_the_end.flip(1), torch.zeros(2, 5, dtype=torch.bool)):
        with torch.no_grad():
            want = module(x, src_key_padding_mask=mask)
        got = network.interpret({"src": x, "src_key_padding_mask": mask})["output0"]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
