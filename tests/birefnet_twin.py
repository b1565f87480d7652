"""BiRefNet in PyTorch, on torchvision's op: what the port in MLX is compared with.

Written for the tests from the published architecture (github.com/ZhengPeng7/BiRefNet, MIT),
with its names in the state dict. Plain and slow: nothing is cut in pieces, fused or reordered.
"""

import itertools

import torch
import torch.nn.functional as F
import torchvision
from torch import nn


def interpolate(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


# ---------------------------------------------------------------------------
# models/backbones/swin_v1.py


class Mlp(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class WindowAttention(nn.Module):
    def __init__(self, channels, heads, window):
        super().__init__()
        self.heads = heads
        rows = (2 * window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        positions = list(itertools.product(range(window), repeat=2))
        index = [
            [(y - v + window - 1) * (2 * window - 1) + (x - u + window - 1) for v, u in positions]
            for y, x in positions
        ]
        self.register_buffer("relative_position_index", torch.tensor(index))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x, mask=None):
        """x: (windows, N, C); mask: (windows, N, N) or None."""
        windows, n, channels = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.reshape(windows, n, self.heads, -1).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(2, 3) / (channels // self.heads) ** 0.5
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(
            2, 0, 1
        )
        if mask is not None:
            scores = scores + mask[:, None]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class SwinTransformerBlock(nn.Module):
    def __init__(self, channels, heads, window, shift):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)

    def forward(self, x):
        """x: (N, H, W, C). Windows are cut out one at a time."""
        y = self.norm1(x)
        height, width = x.shape[1:3]
        window, shift = self.window, self.shift
        y = F.pad(y, (0, 0, 0, -width % window, 0, -height % window))
        # Where each pixel comes from: rolled by the shift, as an image of labels.
        tall, wide = y.shape[1:3]
        edges = [[0, -window, -shift] if shift else [0] for _ in range(2)]
        labels = torch.zeros(tall, wide)
        for number, (top, left) in enumerate(itertools.product(*edges)):
            labels[top:, left:] = number
        y = torch.roll(y, (-shift, -shift), (1, 2))
        out = torch.empty_like(y)
        for top in range(0, tall, window):
            for left in range(0, wide, window):
                cut = slice(top, top + window), slice(left, left + window)
                label = labels[cut].flatten()
                mask = torch.where(label[:, None] == label, 0.0, -100.0).to(y.dtype)
                inside = y[:, cut[0], cut[1]]
                attended = self.attn(inside.flatten(1, 2), mask.expand(len(y), -1, -1))
                out[:, cut[0], cut[1]] = attended.reshape(inside.shape)
        x = x + torch.roll(out, (shift, shift), (1, 2))[:, :height, :width]
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class BasicLayer(nn.Module):
    def __init__(self, channels, depth, heads, window, merges):
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(channels, heads, window, window // 2 if i % 2 else 0)
            for i in range(depth)
        )
        if merges:
            self.downsample = PatchMerging(channels)


class PatchEmbed(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 4, 4)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class SwinTransformer(nn.Module):
    def __init__(self, channels, depths, heads, window):
        super().__init__()
        self.patch_embed = PatchEmbed(channels)
        self.layers = nn.ModuleList(
            BasicLayer(channels * 2**i, depths[i], heads[i], window, i < 3) for i in range(4)
        )
        for i in range(4):
            self.add_module(f"norm{i}", nn.LayerNorm(channels * 2**i))

    def forward(self, x):
        x = self.patch_embed(x)
        maps = []
        for i, layer in enumerate(self.layers):
            for block in layer.blocks:
                x = block(x)
            maps.append(getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2))
            if i < 3:
                x = layer.downsample(x)
        return maps


# ---------------------------------------------------------------------------
# models/modules/


class DeformableConv2d(nn.Module):
    def __init__(self, inputs, outputs, kernel):
        super().__init__()
        same = {"kernel_size": kernel, "padding": kernel // 2}
        self.offset_conv = nn.Conv2d(inputs, 2 * kernel * kernel, **same)
        self.modulator_conv = nn.Conv2d(inputs, kernel * kernel, **same)
        self.regular_conv = nn.Conv2d(inputs, outputs, bias=False, **same)

    def forward(self, x):
        return torchvision.ops.deform_conv2d(
            x,
            self.offset_conv(x),
            self.regular_conv.weight,
            padding=self.regular_conv.padding,
            mask=2 * self.modulator_conv(x).sigmoid(),
        )


class ASPPModuleDeformable(nn.Module):
    def __init__(self, inputs, kernel):
        super().__init__()
        self.atrous_conv = DeformableConv2d(inputs, 256, kernel)
        self.bn = nn.BatchNorm2d(256)

    def forward(self, x):
        return self.bn(self.atrous_conv(x)).relu()


class ASPPDeformable(nn.Module):
    def __init__(self, channels, dropout=0.5):
        super().__init__()
        self.aspp1 = ASPPModuleDeformable(channels, 1)
        self.aspp_deforms = nn.ModuleList(ASPPModuleDeformable(channels, k) for k in (1, 3, 7))
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, 256, 1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
        )
        self.conv1 = nn.Conv2d(5 * 256, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        pooled = interpolate(self.global_avg_pool(x), x.shape[2:])
        branches = [self.aspp1(x), *(branch(x) for branch in self.aspp_deforms), pooled]
        return self.dropout(self.bn1(self.conv1(torch.cat(branches, 1))).relu())


class BasicDecBlk(nn.Module):
    def __init__(self, inputs, outputs, dropout=0.5):
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, 64, 3, padding=1)
        self.dec_att = ASPPDeformable(64, dropout)
        self.conv_out = nn.Conv2d(64, outputs, 3, padding=1)
        self.bn_in = nn.BatchNorm2d(64)
        self.bn_out = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn_out(self.conv_out(self.dec_att(self.bn_in(self.conv_in(x)).relu())))


class BasicLatBlk(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.conv(x)


# ---------------------------------------------------------------------------
# models/birefnet.py


class SimpleConvs(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 64, 3, padding=1)
        self.conv_out = nn.Conv2d(64, outputs, 3, padding=1)

    def forward(self, x):
        return self.conv_out(self.conv1(x))


def image_patches(image, size, order):
    """(N, C, H, W) to (N, C * patches, *size), patch by patch.

    order: "columns" takes the patches column by column, each with its channels; "channels"
    takes the channels one by one, each with its patches row by row.
    """
    height, width = size
    rows, columns = range(0, image.shape[2], height), range(0, image.shape[3], width)
    if order == "columns":
        places = [(slice(None), top, left) for left in columns for top in rows]
    else:
        channels = range(image.shape[1])
        places = [
            (slice(c, c + 1), top, left) for c in channels for top in rows for left in columns
        ]
    return torch.cat(
        [image[:, c, top : top + height, left : left + width] for c, top, left in places], 1
    )


def laplacian(image):
    """kornia.filters.laplacian(image, kernel_size=5) of (N, 1, H, W)."""
    kernel = torch.ones(1, 1, 5, 5, dtype=image.dtype)
    kernel[..., 2, 2] = -24
    kernel /= kernel.abs().sum()
    return F.conv2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), kernel)


class Decoder(nn.Module):
    def __init__(self, channels, patch_order, dropout):
        super().__init__()
        self.patch_order = patch_order
        c4, c3, c2, c1 = channels
        self.ipt_blk5 = SimpleConvs(3 * 32**2, c4 // 8)
        self.ipt_blk4 = SimpleConvs(3 * 16**2, c4 // 8)
        self.ipt_blk3 = SimpleConvs(3 * 8**2, c3 // 8)
        self.ipt_blk2 = SimpleConvs(3 * 4**2, c2 // 8)
        self.ipt_blk1 = SimpleConvs(3, c1 // 8)
        self.decoder_block4 = BasicDecBlk(c4 + c4 // 8, c3, dropout)
        self.decoder_block3 = BasicDecBlk(c3 + c4 // 8, c2, dropout)
        self.decoder_block2 = BasicDecBlk(c2 + c3 // 8, c1, dropout)
        self.decoder_block1 = BasicDecBlk(c1 + c2 // 8, c1 // 2, dropout)
        self.conv_out1 = nn.Sequential(nn.Conv2d(c1 // 2 + c1 // 8, 1, 1))
        for level, count in ((4, c3), (3, c2), (2, c1)):
            self.add_module(f"lateral_block{level}", BasicLatBlk(count, count))
            self.add_module(f"conv_ms_spvn_{level}", nn.Conv2d(count, 1, 1))
            convs = nn.Conv2d(count, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
            self.add_module(f"gdt_convs_{level}", nn.Sequential(*convs))
            self.add_module(f"gdt_convs_pred_{level}", nn.Sequential(nn.Conv2d(16, 1, 1)))
            self.add_module(f"gdt_convs_attn_{level}", nn.Sequential(nn.Conv2d(16, 1, 1)))

    def forward(self, image, maps, gradient):
        """What the official model gives in training, whatever the mode."""
        predictions, gradient_predictions, gradient_labels = [], [], []
        x = maps[3]
        for level in (4, 3, 2):
            patches = image_patches(image, x.shape[2:], self.patch_order)
            x = torch.cat([x, getattr(self, f"ipt_blk{level + 1}")(patches)], 1)
            p = getattr(self, f"decoder_block{level}")(x)
            predictions.append(getattr(self, f"conv_ms_spvn_{level}")(p))
            edges = getattr(self, f"gdt_convs_{level}")(p)
            gradient_labels.append(gradient * interpolate(predictions[-1], gradient.shape[2:]))
            gradient_predictions.append(getattr(self, f"gdt_convs_pred_{level}")(edges))
            p = p * getattr(self, f"gdt_convs_attn_{level}")(edges).sigmoid()
            lateral = maps[level - 2]
            x = interpolate(p, lateral.shape[2:])
            x = x + getattr(self, f"lateral_block{level}")(lateral)
        patches = image_patches(image, x.shape[2:], self.patch_order)
        x = self.decoder_block1(torch.cat([x, self.ipt_blk2(patches)], 1))
        x = torch.cat([interpolate(x, image.shape[2:]), self.ipt_blk1(image)], 1)
        predictions.append(self.conv_out1(x))
        return predictions, gradient_predictions, gradient_labels


class BiRefNet(nn.Module):
    """Of a BiRefNetConfig. Gives all predictions and gradient maps in either mode."""

    def __init__(self, config):
        super().__init__()
        backbone = config.backbone
        channels = [2 * backbone.channels * 2**i for i in (3, 2, 1, 0)]
        self.bb = SwinTransformer(
            backbone.channels, backbone.depths, backbone.heads, backbone.window
        )
        self.squeeze_module = nn.Sequential(BasicDecBlk(sum(channels), channels[0], config.dropout))
        self.decoder = Decoder(channels, config.patch_order, config.dropout)

    def forward(self, x):
        """x: (N, 3, H, W)."""
        half = self.bb(interpolate(x, (x.shape[2] // 2, x.shape[3] // 2)))
        maps = [
            torch.cat([full, interpolate(small, full.shape[2:])], 1)
            for full, small in zip(self.bb(x), half, strict=True)
        ]
        size = maps[3].shape[2:]
        maps[3] = self.squeeze_module(
            torch.cat([*(interpolate(m, size) for m in maps[:3]), maps[3]], 1)
        )
        return self.decoder(x, maps, laplacian(x.mean(1, keepdim=True)))


def randomize(module, seed=0):
    """Random weights and batch statistics that keep activations of order one; the module."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, scale, mean=0.0):
        return mean + scale * torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            last = name.rsplit(".", 1)[-1]
            if not tensor.is_floating_point():
                continue
            if last == "running_var":
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif last == "running_mean":
                tensor.copy_(normal(tensor, 0.3))
            elif last == "relative_position_bias_table":
                tensor.copy_(normal(tensor, 0.5))
            elif "offset_conv" in name or "modulator_conv" in name:
                scale = 0.7 if last == "bias" else 0.5 / tensor[0].numel() ** 0.5
                tensor.copy_(normal(tensor, scale))
            elif tensor.ndim == 1:  # biases, and the weights of normalisation
                tensor.copy_(normal(tensor, 0.2, 1.0 if last == "weight" else 0.0))
            else:
                tensor.copy_(normal(tensor, tensor[0].numel() ** -0.5))
    return module
