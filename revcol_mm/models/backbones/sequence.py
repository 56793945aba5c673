# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""RevCol as the encoder of a sequence Transformer (RevCol, appendix B.2)."""
import math
from typing import Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from .base import Column, ColumnStack, TokenFusion


def sinusoidal_positions(length: int, channels: int, device: torch.device) -> Tensor:
    """Position encoding of the original Transformer (section 3.5): (length, channels), sines and cosines interleaved."""
    steps = torch.arange(0, channels, 2, device=device, dtype=torch.float32)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), torch.exp(-math.log(1e4) / channels * steps))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :channels]


class SequenceStem(nn.Module):
    """Tokens to embeddings (times √d), plus sinusoidal positions; then dropout.

    Args:
        d_model: d.
        vocab_size: number of tokens; None where the input is embedded already, and only positions are added.
        dropout: rate.
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
    """Columns of Transformer encoder layers for sequences; a drop-in ``custom_encoder`` of :class:`torch.nn.Transformer`.

    The stem embeds tokens and adds positions. All levels of all columns keep the sequence's length and width; fusions are
    Linear and LayerNorm, as in :class:`~revcol_mm.models.RevColViT`. The output is the highest level of the last column,
    behind a LayerNorm, as torch's own encoder ends. γ has one dimension, so that ``nn.Transformer``'s initialisation of all
    matrices leaves it alone.

    Args:
        d_model (int): width. Default: 768.
        nhead (int): heads. Default: 12.
        dim_feedforward (int): width inside the FFN. Default: 3072.
        depths (Sequence[int]): layers of each level; its length is the number of levels. Default: (1, 1, 1, 1).
        num_columns (int): Default: 4.
        dropout (float): of the embeddings, attention and FFN. Default: 0.1.
        activation (str): 'relu' or 'gelu'. Default: 'relu'.
        norm_first (bool): pre-norm layers instead of the original Transformer's post-norm. Default: False.
        vocab_size (int, optional): size of the token embedding; None takes embeddings only. Default: None.
        batch_first (bool): sequences are (N, T) or (N, T, d), as against (T, N) or (T, N, d). Default: True.
        frozen_stages, reversible, drift_threshold, on_drift, with_cp, init_cfg: as in :class:`~revcol_mm.models.RevCol`.

    Raises:
        ValueError: for arguments outside of the above, naming the argument and the value.
    """

    def __init__(self,
                 d_model: int = 768,
                 nhead: int = 12,
                 dim_feedforward: int = 3072,
                 depths: Sequence[int] = (1, 1, 1, 1),
                 num_columns: int = 4,
                 dropout: float = 0.1,
                 activation: str = 'relu',
                 norm_first: bool = False,
                 vocab_size: int | None = None,
                 batch_first: bool = True,
                 frozen_stages: int = -1,
                 reversible: bool = False,
                 drift_threshold: float | None = None,
                 on_drift: str = 'raise',
                 with_cp: bool = False,
                 init_cfg: dict | None = None) -> None:
        depths = tuple(depths)
        if not depths or any(not isinstance(depth, int) or depth < 1 for depth in depths):
            raise ValueError(f'depths={depths!r}: positive integers, one for each level')
        if not isinstance(num_columns, int) or num_columns < 1:
            raise ValueError(f'num_columns={num_columns!r}: a positive integer')
        if d_model % nhead:
            raise ValueError(f'd_model={d_model!r}: a multiple of nhead={nhead!r}')
        super().__init__(depths, num_columns, (len(depths) - 1, ), frozen_stages, reversible, drift_threshold, on_drift,
                         with_cp, init_cfg)
        self.d_model, self.batch_first = d_model, batch_first
        self.stem = SequenceStem(d_model, vocab_size, dropout)
        self.add_columns(lambda first: Column(
            depths, [(d_model, )] * len(depths), first=first,
            fusion=lambda level, sources: TokenFusion(d_model, level, sources),
            block=lambda level, index: nn.TransformerEncoderLayer(
                d_model, nhead, dim_feedforward, dropout, activation, batch_first=True, norm_first=norm_first)))
        self.norm = nn.LayerNorm(d_model)
        self.freeze_stages()

    def forward(self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
                is_causal: bool | None = None) -> Tensor:
        """Encodes a batch of sequences.

        Args:
            src: tokens (N, T), or embeddings (N, T, d_model).
            mask: who attends to whom, (T, T) or (N·nhead, T, T): bool (True: not allowed) or added to the logits.
            src_key_padding_mask: (N, T), True where a token is padding, which nobody attends to.
            is_causal: a hint that ``mask`` is the causal one.

        Returns:
            Tensor: (N, T, d_model). What stands at padded positions has no meaning.
        """
        tokens = not src.is_floating_point()
        if src.dim() != 3 - tokens or (not tokens and src.shape[-1] != self.d_model):
            raise ValueError(f'src of shape {tuple(src.shape)} and dtype {src.dtype}: integer tokens (N, T), or embeddings '
                             f'(N, T, {self.d_model}); with batch_first=False (T, N) and (T, N, {self.d_model})')
        if tokens and self.stem.embedding is None:
            raise ValueError('src holds tokens, but the encoder was built without vocab_size: it takes embeddings')
        x = self.stem(src if self.batch_first else src.transpose(0, 1))
        context = dict(src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=bool(is_causal))
        x = self.norm(*self.run_columns(x, context=context))
        return x if self.batch_first else x.transpose(0, 1)


class WideMemoryDecoderLayer(nn.TransformerDecoderLayer):
    """torch's decoder layer with a memory of another width than its own, to stand behind :class:`RevColTransformerEncoder`.

    Args:
        d_model: width of the decoder.
        nhead: heads.
        memory_dim: width of the encoder's output, from which keys and values come.
        kwargs: as in :class:`torch.nn.TransformerDecoderLayer`.
    """

    def __init__(self, d_model: int, nhead: int, memory_dim: int, dim_feedforward: int = 2048, dropout: float = 0.1,
                 batch_first: bool = True, **kwargs) -> None:
        super().__init__(d_model, nhead, dim_feedforward, dropout, batch_first=batch_first, **kwargs)
        self.multihead_attn = nn.MultiheadAttention(
            d_model, nhead, dropout=dropout, kdim=memory_dim, vdim=memory_dim, batch_first=batch_first)
