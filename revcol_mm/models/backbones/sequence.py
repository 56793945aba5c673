# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol as the encoder of a sequence Transformer (RevCol, appendix B.2)."""
import math
from typing import Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..layers import check_positive_int
from .base import Column, ColumnStack, TokenFusion


def sinusoidal_positions(length: int, channels: int, device: torch.device) -> Tensor:
    """Position encoding of the original Transformer (its section 3.5): (length, channels), sines and cosines interleaved."""
    steps = torch.arange(0, channels, 2, device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), torch.exp(-math.log(1e4) / channels * steps))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :channels]


class SequenceStem(nn.Module):
    """Embeds tokens (times √d), adds sinusoidal positions, and applies dropout.

    Args:
        d_model (int): d.
        vocab_size (int | None): number of different tokens; None if the input is already embedded.
        dropout (float): dropout rate.
    """

    def __init__(self, d_model: int, vocab_size: int | None, dropout: float) -> None:
        super().__init__()
        self.d_model = d_model
        self.embedding = nn.Embedding(vocab_size, d_model) if vocab_size else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=d_model ** -0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            x = self.embedding(x) * math.sqrt(self.d_model)
        return self.dropout(x + sinusoidal_positions(x.shape[1], self.d_model, x.device).to(x.dtype))


@MODELS.register_module()
class RevColTransformerEncoder(ColumnStack):
    """Columns of Transformer encoder layers for sequences; it can be the ``custom_encoder`` of :class:`torch.nn.Transformer`.

    The stem embeds tokens and adds positions. All levels of all columns keep the length and width of the sequence. Fusions are
    Linear and LayerNorm, as in :class:`~revcol_mm.models.RevColViT`. The output is the highest level of the last column, after
    a LayerNorm, as in torch's own encoder. γ has one dimension, so that ``nn.Transformer``, which initialises all matrices,
    does not change it.

    Args:
        d_model (int): width. Default: 768.
        nhead (int): number of attention heads. Default: 12.
        dim_feedforward (int): width inside the FFN. Default: 3072.
        depths (Sequence[int]): layers of each level; its length is the number of levels. Default: (1, 1, 1, 1).
        num_columns (int): number of columns. Default: 4.
        dropout (float): dropout rate of the embeddings, attention and FFN. Default: 0.1.
        activation (str): 'relu' or 'gelu'. Default: 'relu'.
        norm_first (bool): whether layers are pre-norm, instead of post-norm as in the original Transformer. Default: False.
        vocab_size (int | None): number of different tokens. Default: None, the input must be embeddings.
        batch_first (bool): whether sequences are (N, T) or (N, T, d), instead of (T, N) or (T, N, d). Default: True.
        **kwargs: ``frozen_stages``, ``reversible``, ``stored_columns``, ``drift_threshold``, ``on_drift``, ``with_cp`` and
            ``init_cfg``, as in :class:`~revcol_mm.models.RevCol`, with its defaults.

    Raises:
        ValueError: if an argument has another value. The message names both.
    """

    def __init__(self, d_model: int = 768, nhead: int = 12, dim_feedforward: int = 3072,
                 depths: Sequence[int] = (1, 1, 1, 1), num_columns: int = 4, dropout: float = 0.1, activation: str = 'relu',
                 norm_first: bool = False, vocab_size: int | None = None, batch_first: bool = True, **kwargs) -> None:
        depths = tuple(depths)
        if not depths or any(not isinstance(depth, int) or depth < 1 for depth in depths):
            raise ValueError(f'depths must be positive integers, one for each level, but got {depths!r}')
        check_positive_int('num_columns', num_columns)
        if d_model % nhead:
            raise ValueError(f'd_model must be a multiple of nhead, but got d_model={d_model!r} and nhead={nhead!r}')
        super().__init__(depths, num_columns, (len(depths) - 1, ), **kwargs)
        self.d_model, self.batch_first = d_model, batch_first
        self.stem = SequenceStem(d_model, vocab_size, dropout)
        self.add_columns(lambda first: Column(
            depths, [(d_model, )] * len(depths), first=first,
            fusion=lambda level, above: TokenFusion(d_model, level, above),
            block=lambda level, index: nn.TransformerEncoderLayer(
                d_model, nhead, dim_feedforward, dropout, activation, batch_first=True, norm_first=norm_first)))
        self.norm = nn.LayerNorm(d_model)
        self.freeze_stages()

    def forward(self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
                is_causal: bool | None = None) -> Tensor:
        """Encodes a batch of sequences.

        Args:
            src (Tensor): tokens (N, T), or embeddings (N, T, d_model).
            mask (Tensor | None): attention mask, (T, T) or (N·nhead, T, T): bool, where True forbids attention, or numbers that
                are added to the logits. Default: None.
            src_key_padding_mask (Tensor | None): (N, T), True at padding, which no token attends to. Default: None.
            is_causal (bool | None): a hint that ``mask`` is the causal mask. Default: None, which means False.

        Returns:
            Tensor: (N, T, d_model). The values at padded positions have no meaning.

        Raises:
            ValueError: if ``src`` has another shape, or holds tokens and there is no ``vocab_size``.
        """
        tokens = not src.is_floating_point()
        if src.dim() != 3 - tokens or (not tokens and src.shape[-1] != self.d_model):
            raise ValueError(f'src must be integer tokens (N, T) or embeddings (N, T, {self.d_model}), with batch_first=False '
                             f'(T, N) or (T, N, {self.d_model}), but got the shape {tuple(src.shape)} and dtype {src.dtype}')
        if tokens and self.stem.embedding is None:
            raise ValueError('src must hold embeddings, because the encoder was built without vocab_size, but got tokens')
        x = self.stem(src if self.batch_first else src.transpose(0, 1))
        context = dict(src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
        x = self.norm(*self.run_columns(x, context=context))
        return x if self.batch_first else x.transpose(0, 1)


class WideMemoryDecoderLayer(nn.TransformerDecoderLayer):
    """torch's decoder layer for an encoder of another width, such as :class:`RevColTransformerEncoder`.

    Args:
        d_model (int): width of the decoder.
        nhead (int): number of attention heads.
        memory_dim (int): width of the encoder's output, from which keys and values are computed.
        dim_feedforward (int), dropout (float), batch_first (bool), **kwargs: as in :class:`torch.nn.TransformerDecoderLayer`.
            Defaults: 2048, 0.1 and True.
    """

    def __init__(self, d_model: int, nhead: int, memory_dim: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 batch_first: bool = True, **kwargs) -> None:
        super().__init__(d_model, nhead, dim_feedforward, dropout, batch_first=batch_first, **kwargs)
        self.multihead_attn = nn.MultiheadAttention(
            d_model, nhead, dropout=dropout, kdim=memory_dim, vdim=memory_dim, batch_first=batch_first)
