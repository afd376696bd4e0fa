"""Small networks with depthwise filters."""

import timm
import torch
from timm.models.convmixer import ConvMixer
from torch import nn

CONVNEXT = {"depths": (1, 2, 2, 1), "dims": (12, 16, 20, 24), "num_classes": 3}


def convmixer(seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"dim": 24, "depth": 4, "kernel_size": 5, "patch_size": 4, "in_chans": 1, "num_classes": 3, **more}
    return ConvMixer(**sizes).eval()


def convnext(seed=0, **more):
    torch.manual_seed(seed)
    return timm.create_model("convnext_tiny", **{**CONVNEXT, **more}).eval()


def vit(seed=0):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


class Both(nn.Module):
    """Depthwise filters, attention, and convolutions of other kinds."""

    def __init__(self, channels=12):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3)
        self.mix = nn.Conv2d(channels, channels, (3, 5), padding="same", groups=channels)
        self.widen = nn.Conv2d(channels, 2 * channels, 7, groups=channels, bias=False, padding=3)
        self.pointwise = nn.Conv2d(2 * channels, channels, 1)
        self.scale = nn.Conv2d(channels, channels, 1, groups=channels)
        self.grouped = nn.Conv2d(channels, channels, 3, groups=channels // 2, padding=1)
        self.attention = nn.MultiheadAttention(channels, 3, batch_first=True)

    def forward(self, x):
        x = self.grouped(self.scale(self.pointwise(self.widen(self.mix(self.stem(x))))))
        tokens = x.flatten(2).mT
        return self.attention(tokens, tokens, tokens)[0]


def both(seed=0):
    torch.manual_seed(seed)
    return Both().eval()
