"""MobileSAM's image encoder in PyTorch, its names and batch norms: an oracle.

Written from the architecture alone, and as plainly as it can be: windows and their
tokens are looped over. It takes images of any size that 16 divides.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional

STRIDES = (2, 2, 1)


def conv(n, m, side, stride=1, groups=1):
    """A convolution `c` and its batch norm `bn`."""
    module = nn.Sequential()
    convolution = nn.Conv2d(n, m, side, stride, side // 2, groups=groups, bias=False)
    module.add_module("c", convolution)
    module.add_module("bn", nn.BatchNorm2d(m))
    return module


class MBConv(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.conv1 = conv(width, hidden, 1)
        self.conv2 = conv(hidden, hidden, 3, groups=hidden)
        self.conv3 = conv(hidden, width, 1)

    def forward(self, x):
        y = functional.gelu(self.conv1(x))
        y = functional.gelu(self.conv2(y))
        return functional.gelu(self.conv3(y) + x)


class Merging(nn.Module):
    def __init__(self, n, m, stride):
        super().__init__()
        self.conv1 = conv(n, m, 1)
        self.conv2 = conv(m, m, 3, stride, groups=m)
        self.conv3 = conv(m, m, 1)

    def forward(self, x):
        x = functional.gelu(self.conv1(x))
        return self.conv3(functional.gelu(self.conv2(x)))


class Attention(nn.Module):
    def __init__(self, width, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))

    def forward(self, x):  # [T, D], the tokens of one window
        qkv = self.qkv(self.norm(x)).view(len(x), self.heads, -1)
        q, k, v = qkv.chunk(3, -1)
        places = [*itertools.product(range(self.window), repeat=2)]
        found = []
        for head in range(self.heads):
            logits = q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5
            table = self.attention_biases[head]
            biases = [
                [table[abs(y - i) * self.window + abs(x - j)] for i, j in places]
                for y, x in places
            ]
            biases = torch.stack([torch.stack(row) for row in biases])
            found.append((logits + biases).softmax(-1) @ v[:, head])
        return self.proj(torch.cat(found, -1))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(self.norm(x))))


class Block(nn.Module):
    def __init__(self, width, heads, window, hidden):
        super().__init__()
        self.attn = Attention(width, heads, window)
        self.local_conv = conv(width, width, 3, groups=width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x):  # [B, D, h, w]
        x = self.local_conv(x + self.attended(x))
        return x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def attended(self, x):
        batch, features, height, width = x.shape
        side = self.attn.window
        rows, columns = (-(-size // side) for size in (height, width))
        padded = torch.zeros(batch, features, rows * side, columns * side)
        padded[:, :, :height, :width] = x
        y = torch.empty_like(padded)
        for image, row, column in itertools.product(
            range(batch), range(rows), range(columns)
        ):
            own = (
                image,
                slice(None),
                *(slice(i * side, (i + 1) * side) for i in (row, column)),
            )
            tokens = padded[own].reshape(features, -1).T
            y[own] = self.attn(tokens).T.reshape(features, side, side)
        return y[:, :, :height, :width]


class Layer(nn.Module):
    def __init__(self, blocks, downsample):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class ChannelNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Embedding(nn.Module):
    def __init__(self, width):
        super().__init__()
        half = width // 2
        self.seq = nn.Sequential(
            conv(3, half, 3, 2), nn.GELU(), conv(half, width, 3, 2)
        )


class Encoder(nn.Module):
    """Fields as in `TinyViTConfig`."""

    def __init__(self, widths, depths, heads, windows, out_channels, ratio=4):
        super().__init__()
        self.patch_embed = Embedding(widths[0])
        self.layers = nn.ModuleList()
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            own = stage and (heads[stage - 1], windows[stage - 1])
            blocks = [
                Block(width, *own, ratio * width)
                if own
                else MBConv(width, ratio * width)
                for _ in range(depth)
            ]
            last = stage == len(widths) - 1
            down = None if last else Merging(width, widths[stage + 1], STRIDES[stage])
            self.layers.append(Layer(blocks, down))
        self.norm_head = nn.LayerNorm(widths[-1])  # of pre-training, as the next
        self.head = nn.Linear(widths[-1], 5)
        self.neck = nn.Sequential(
            nn.Conv2d(widths[-1], out_channels, 1, bias=False),
            ChannelNorm(out_channels, eps=1e-6),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            ChannelNorm(out_channels, eps=1e-6),
        )

    def forward(self, images):
        x = self.patch_embed.seq(images)
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)


def randomised(encoder):
    """Draws every parameter and every running mean and variance again.

    Weights are large enough that what an image says reaches the end.
    """
    for name, tensor in encoder.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.3, 3)
        elif tensor.is_floating_point():
            weight = tensor.ndim > 1 and "bias" not in name
            tensor.normal_(0, 2 * tensor[0].numel() ** -0.5 if weight else 0.3)
            norm = ("bn.weight", "norm.weight", "neck.1.weight", "neck.3.weight")
            tensor.add_(1.0 if name.endswith(norm) else 0.0)
    return encoder.eval()
