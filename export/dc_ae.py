"""DC-AE's multi-scale attention in a form that can be traced.

diffusers picks one of two forms of the same attention by `H·W > head_dim`; a trace would keep the one
of its example and be wrong elsewhere in speed, if not in value. Both are Σ relu(q)·relu(k)·v / Σ
relu(q)·relu(k), so the linear one, whose cost grows with H·W and not its square, serves all sizes.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import SanaMultiscaleLinearAttention
from torch import Tensor, nn


class LinearAttentionProcessor:
    """The linear form, whatever the size. Takes diffusers' place through its own `processor` slot."""

    def __call__(self, attn: SanaMultiscaleLinearAttention, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        batch, _, height, width = hidden_states.shape
        channels_last = hidden_states.movedim(1, -1)
        qkv = torch.cat([attn.to_q(channels_last), attn.to_k(channels_last), attn.to_v(channels_last)], dim=3)
        qkv = qkv.movedim(-1, 1)
        scales = torch.cat([qkv, *(block(qkv) for block in attn.to_qkv_multiscale)], dim=1)
        scales = scales.float().reshape(batch, -1, 3 * attn.attention_head_dim, height * width)
        query, key, value = scales.chunk(3, dim=2)
        query, key = attn.nonlinearity(query), attn.nonlinearity(key)
        context = torch.matmul(value, key.transpose(-1, -2))
        weight = torch.matmul(key.sum(dim=-1, keepdim=True).transpose(-1, -2), query)
        # Not `weight + 1e-15`: the ONNX optimiser drops the addend of 1e-15, and 0 / 0 is NaN.
        attended = torch.matmul(context, query) / weight.clamp(min=attn.eps)
        attended = attended.to(hidden_states.dtype).reshape(batch, -1, height, width)
        out = attn.to_out(attended.movedim(1, -1))
        if attn.norm_type == "rms_norm":
            out = attn.norm_out(out).movedim(-1, 1)
        else:
            out = attn.norm_out(out.movedim(-1, 1))
        return out + residual if attn.residual_connection else out


def use_linear_attention(decoder: nn.Module) -> nn.Module:
    """Sets the traceable processor on every attention of a DC-AE part; returns it."""
    for module in decoder.modules():
        if isinstance(module, SanaMultiscaleLinearAttention):
            module.processor = LinearAttentionProcessor()
    return decoder
