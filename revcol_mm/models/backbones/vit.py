# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol-ViT: isotropic columns of ViT blocks (RevCol, appendix B.1)."""
import math
from typing import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmcv.cnn.bricks.transformer import PatchEmbed
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import check_positive_int, init_weights
from .base import Column, ColumnStack, TokenFusion

#: Upper bound of the learned scale of the cosine, as in Swin Transformer V2.
MAX_LOGIT_SCALE = 100.


class CosineAttention(nn.Module):
    """Multi-head self-attention on scaled cosines: softmax(s·cos(q, k))·v (section 3.2 of Swin Transformer V2).

    ``logit_scale`` is log s, one per head. s starts at 10, and is at most 100.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.logit_scale = nn.Parameter(torch.full((num_heads, ), math.log(10.)))
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, channels = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (N, heads, L, C / heads)
        # The norms need at least float32, because the squares of half-precision q and k overflow and underflow.
        dtype = torch.promote_types(v.dtype, torch.float32)
        scale = self.logit_scale.to(dtype).clamp(max=math.log(MAX_LOGIT_SCALE)).exp()
        q = F.normalize(q.to(dtype), dim=-1) * scale.view(-1, 1, 1)
        k = F.normalize(k.to(dtype), dim=-1)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=1.)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, channels))


class ViTBlock(nn.Module):
    """Cosine attention and FFN, each followed by a LayerNorm inside the residual branch: x + LN(f(x)).

    Args:
        channels (int): C.
        num_heads (int): number of attention heads.
        drop_path_rate (float): probability that a branch is dropped. Default: 0.
    """

    def __init__(self, channels: int, num_heads: int, drop_path_rate: float = 0.) -> None:
        super().__init__()
        self.attn = CosineAttention(channels, num_heads)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.ffn = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.norm1(self.attn(x)))
        return x + self.drop_path(self.norm2(self.ffn(x)))


class PatchStem(nn.Module):
    """Patch embedding plus a learned position embedding, which is interpolated (bicubic) if the image has another size.

    Images whose size is not a multiple of the patch size are padded with zeros at the right and the bottom.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_channels: int, channels: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, channels, kernel_size=patch_size, stride=patch_size, padding='corner')
        grid = [-(-length // patch_size) for length in img_size]
        self.pos_embed = nn.Parameter(torch.zeros(1, channels, *grid))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, size = self.patch_embed(x)  # (N, L, C), (H / patch, W / patch)
        position = self.pos_embed
        if size != position.shape[-2:]:
            position = F.interpolate(position.float(), size=size, mode='bicubic', align_corners=False).to(position.dtype)
        return x + position.flatten(2).transpose(1, 2), size


@MODELS.register_module()
class RevColViT(ColumnStack):
    """RevCol with isotropic columns: all four levels have ViT blocks at the resolution of the patches.

    The input is (N, in_channels, H, W). The output is a tuple of the last column's features, contiguous, all at stride
    ``patch_size``. There is no class token: classifiers pool the last feature map, and
    :class:`revcol_mm.detection.SimpleFPN` makes a pyramid of the feature maps.

    Blocks have post-norm residual branches and scaled cosine attention. All weights are initialised truncated normal (std
    0.02), and then the last Linear of each FFN is divided by √(2·id), where id is the layer id of :meth:`get_layer_depth`. The
    paper does not describe the position embedding. Here it is learned, absolute and interpolated, as in the plain ViT that the
    paper compares with.

    Args:
        arch (str | dict): 'small' or 'base' ('s', 'b'), or a dict with ``embed_dims``, ``depths`` (blocks of the four levels),
            ``num_heads`` and ``num_columns``. Default: 'small'.
        img_size (int | Sequence[int]): size, or (height, width), at which positions are learned; images of other sizes work
            too. Default: 224.
        patch_size (int): side length of a patch in pixels. Default: 16.
        in_channels (int): channels of the image. Default: 3.
        drop_path_rate (float): stochastic depth rate. It rises linearly from 0 over the blocks of a column, and is the same in
            every column. Default: 0.
        out_indices (Sequence[int]): levels to return. Default: (0, 1, 2, 3).
        **kwargs: ``frozen_stages``, ``reversible``, ``stored_columns``, ``drift_threshold``, ``on_drift``, ``with_cp`` and
            ``init_cfg``, as in :class:`~revcol_mm.models.RevCol`, with its defaults.

    Raises:
        TypeError, ValueError: if an argument, or the shape of the images, is of another kind. The message names it.
    """

    ARCHS = {
        'small': dict(embed_dims=224, depths=(2, 2, 2, 2), num_heads=4, num_columns=4),
        'base': dict(embed_dims=384, depths=(3, 3, 3, 3), num_heads=6, num_columns=4),
    }
    ALIASES = dict(s='small', b='base')
    ARCH_KEYS = dict(embed_dims=None, depths=4, num_heads=None, num_columns=None)

    def __init__(self, arch: str | dict = 'small', img_size: int | Sequence[int] = 224, patch_size: int = 16,
                 in_channels: int = 3, drop_path_rate: float = 0., out_indices: Sequence[int] = (0, 1, 2, 3),
                 **kwargs) -> None:
        arch = self.read_arch(arch)
        super().__init__(arch['depths'], arch['num_columns'], out_indices, **kwargs)
        self.embed_dims, self.num_heads = arch['embed_dims'], arch['num_heads']
        if self.embed_dims % self.num_heads:
            raise ValueError("arch['embed_dims'] must be a multiple of arch['num_heads'], but got "
                             f'{self.embed_dims} and {self.num_heads}')
        self.channels = (self.embed_dims, ) * 4
        check_positive_int('patch_size', patch_size)
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(self.img_size) != 2 or any(not isinstance(length, int) or length < 1 for length in self.img_size):
            raise ValueError(f'img_size must be a positive integer or a (height, width) of two, but got {img_size!r}')
        self.patch_size, self.in_channels = patch_size, in_channels

        self.stem = PatchStem(self.img_size, patch_size, in_channels, self.embed_dims)
        rates = self.drop_path_rates(drop_path_rate)
        self.add_columns(lambda first: Column(
            self.depths, [(1, 1, self.embed_dims)] * 4, first=first,
            fusion=lambda level, above: TokenFusion(self.embed_dims, level, above),
            block=lambda level, index: ViTBlock(self.embed_dims, self.num_heads, rates[index])))
        self.apply(init_weights)
        nn.init.trunc_normal_(self.stem.pos_embed, std=0.02)
        with torch.no_grad():
            for name, module in self.named_modules():
                if isinstance(module, ViTBlock):
                    module.ffn[-1].weight /= math.sqrt(2 * self.get_layer_depth(name)[0])
        self.freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Returns the features of the last column.

        Args:
            x (Tensor): images, (N, in_channels, H, W).

        Returns:
            tuple[Tensor]: for each l in ``out_indices``, (N, C, H / patch_size, W / patch_size) rounded up, contiguous.
        """
        self.check_images(x, least=1)
        x, size = self.stem(x)
        # (N, L, C) -> (N, C, H, W); unflatten would fix the size in an exported graph.
        return tuple(feature.transpose(1, 2).reshape(feature.shape[0], self.embed_dims, *size).contiguous()
                     for feature in self.run_columns(x))
