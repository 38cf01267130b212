"""The visual neck: the ViT's features to the LLM's width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vltrain.config.model.mmt import NeckConfig


class BottleneckNeck(nn.Module):
    """Eq. 3: V' = rho(V W_v + b_v) W_t + b_t with a hidden width d_v far below both others.

    rho is SiLU: the paper names SwiGLU, but Eq. 3 has no gate and its shapes leave no room for one.
    Parameters: d d_v + d_v + d_v c + c; 659,584 for 1024 -> 128 -> 4096.
    """

    def __init__(self, vision_width: int, hidden_width: int, llm_width: int) -> None:
        super().__init__()
        self.down = nn.Linear(vision_width, hidden_width)
        self.up = nn.Linear(hidden_width, llm_width)

    def forward(self, features: Tensor) -> Tensor:
        """[..., d_vision] -> [..., d_llm]."""
        return self.up(F.silu(self.down(features)))


class MlpNeck(nn.Module):
    """LLaVA-1.5's projector: two layers of the LLM's width with an exact GELU between them (Liu et al. 2023,
    https://arxiv.org/abs/2310.03744). Names are those of transformers' `LlavaMultiModalProjector`.

    Parameters: d c + c + c c + c; 20,979,712 for 1024 -> 4096.
    """

    def __init__(self, vision_width: int, llm_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, llm_width)
        self.linear_2 = nn.Linear(llm_width, llm_width)

    def forward(self, features: Tensor) -> Tensor:
        """[..., d_vision] -> [..., d_llm]."""
        return self.linear_2(F.gelu(self.linear_1(features)))


def make_neck(vision_width: int, llm_width: int, config: NeckConfig) -> nn.Module:
    """The neck that `config` asks for, Xavier-uniform with zero biases. `linear` is the first LLaVA's single matrix."""
    if config.kind == "linear":
        neck: nn.Module = nn.Linear(vision_width, llm_width)
    elif config.kind == "mlp":
        neck = MlpNeck(vision_width, llm_width)
    else:
        neck = BottleneckNeck(vision_width, config.dim, llm_width)
    for parameter in neck.parameters():
        nn.init.xavier_uniform_(parameter) if parameter.ndim == 2 else nn.init.zeros_(parameter)
    return neck
