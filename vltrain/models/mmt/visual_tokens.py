"""What of a vision tower's states become visual tokens (`model.vision.tokens`): a new choice is a class and a line of
`VISUAL_TOKENS`.

Follows transformers' towers and reuses their modules, but runs them itself: it stops at the last block that is read.
Pixels come as uint8 and are normalised on the device, so that loaders send a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vltrain.config.model.mmt import VisionConfig
from vltrain.errors import InputError
from vltrain.models.backbones.table import tower_of
from vltrain.models.backbones.towers import first_states, tower_blocks
from vltrain.models.pretrained.preprocessor import Preprocessing


class VisualTokens(nn.Module):
    """A tower up to the last of its blocks that is read. `clip`, whichever tower it is: checkpoints have that name.

    Args:
        clip: transformers' network of a `Tower`.
        num_live: how many of its blocks run.
        activation_checkpointing: recompute each block in the backward pass.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: Any,
        num_live: int,
        activation_checkpointing: bool = False,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.clip = clip
        self.tower = tower_of(clip.config)
        self.num_live = num_live
        self.activation_checkpointing = activation_checkpointing
        self.framing = preprocessing.framing
        self.image_size = preprocessing.image_size or self.tower.image_size(clip.config)
        """Edge of the square that it reads, in pixels."""
        self.num_prefix = self.tower.has_cls + self.tower.registers(clip.config)
        """Rows in front of the patches: [cls] and registers."""
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        return self.clip.config.hidden_size

    @property
    def grid(self) -> int:
        """Patches along an image's edge."""
        return self.image_size // self.clip.config.patch_size

    @property
    def num_tokens(self) -> int:
        """Visual tokens per image."""
        raise NotImplementedError

    @property
    def last_rows(self) -> int:
        """How many rows the last block computes: of the others only keys and values are read."""
        return self.num_rows

    @property
    def num_rows(self) -> int:
        """Rows of the residual stream."""
        return self.num_prefix + self.grid**2

    @property
    def live_blocks(self) -> list[nn.Module]:
        """The blocks that run."""
        return tower_blocks(self.clip)[: self.num_live]

    @property
    def reads_all(self) -> bool:
        """Whether what stands behind the blocks is read too."""
        return False

    def unused_parameters(self) -> set[nn.Parameter]:
        """Parameters that no output depends on: later blocks, and what stands behind them."""
        idle = {one for name in self.tower.idle if (one := attrgetter(name)(self.clip)) is not None}
        if self.reads_all:
            return idle
        after = [getattr(self.clip, name) for name in self.tower.after if hasattr(self.clip, name)]
        dead = [*after, *tower_blocks(self.clip)[self.num_live :]]
        return idle | {parameter for module in dead for parameter in module.parameters()}

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> fp32, mean and deviation taken out."""
        return (pixels.float() / 255 - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> [N, V, d_vision]."""
        raise NotImplementedError

    def _start(self, pixels: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """(what the first block reads, [N, P, d_vision]; arguments of every block behind it)."""
        normed = self.normalise(pixels)
        return first_states(self.clip, normed), (None, *self.tower.beside(self.clip, normed))

    def _last_states(self, pixels: Tensor) -> Tensor:
        """What the last live block makes of them, [N, P, d_vision]."""
        states, beside = self._start(pixels)
        for block in self.live_blocks:
            states = self._run(block, states, *beside)
        return states

    def _run(self, function: Callable[..., Tensor], *arguments: object) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


class ClsTaps(VisualTokens):
    """[cls] after blocks `tap_every`, 2 `tap_every`, ...: equals `hidden_states[tap_every::tap_every][:, 0]` of the
    ViT.

    The states are raw: no final norm and no projection, as in the paper. Where the family says how, the last block
    works for [cls] alone (of the others only keys and values are read), which saves five sixths of it. Whether the
    ViT's GELU is exact or CLIP's quick one is the checkpoint's `hidden_act`.
    """

    def __init__(
        self,
        clip: Any,
        tap_every: int,
        activation_checkpointing: bool = False,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 (frozen)
    ) -> None:
        tower, num_blocks = tower_of(clip.config), clip.config.num_hidden_layers
        if not tower.has_cls:
            raise InputError(f"model.vision.tokens: found 'cls', but a {tower.title} has no [cls]; take patches")
        if tap_every > num_blocks:
            raise InputError(
                f"model.vision.tap_every: found {tap_every}, expected at most the ViT's {num_blocks} blocks"
            )
        super().__init__(clip, num_blocks // tap_every * tap_every, activation_checkpointing, preprocessing)
        self.tap_every = tap_every

    @property
    def num_tokens(self) -> int:
        return self.num_live // self.tap_every

    @property
    def last_rows(self) -> int:
        return self.num_rows if self.tower.cls_of_block is None else 1

    def forward(self, pixels: Tensor) -> Tensor:
        states, beside = self._start(pixels)
        taps = []
        *blocks, last = self.live_blocks
        for number, block in enumerate(blocks, start=1):
            states = self._run(block, states, *beside)
            if number % self.tap_every == 0:
                taps.append(states[:, 0])
        if self.tower.cls_of_block is None:
            taps.append(self._run(last, states, *beside)[:, 0])
        else:
            taps.append(self._run(self.tower.cls_of_block, last, states))
        return torch.stack(taps, dim=1)


class Patches(VisualTokens):
    """The states of all patches after `blocks` blocks (None: all but the last, as LLaVA has it: Liu et al. 2023,
    https://arxiv.org/abs/2304.08485), row by row; the mean of each square of `pool` x `pool` of them. Raw, without
    [cls] and registers."""

    def __init__(
        self,
        clip: Any,
        blocks: int | None = None,
        pool: int = 1,
        activation_checkpointing: bool = False,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 (frozen)
    ) -> None:
        num_blocks = clip.config.num_hidden_layers
        num_live = max(1, num_blocks - 1) if blocks is None else blocks
        if num_live > num_blocks:
            raise InputError(f"model.vision.blocks: found {num_live}, expected at most the ViT's {num_blocks} blocks")
        super().__init__(clip, num_live, activation_checkpointing, preprocessing)
        self.pool = pool
        if self.grid % pool:
            raise InputError(
                f"model.vision.pool: found {pool}, expected a divisor of the {self.grid} patches along an image's edge"
            )

    @property
    def num_tokens(self) -> int:
        return (self.grid // self.pool) ** 2

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self._last_states(pixels)[:, self.num_prefix :]
        side = self.grid // self.pool
        return patches.unflatten(1, (side, self.pool, side, self.pool)).mean(dim=(2, 4)).flatten(1, 2)


class Pooler(VisualTokens):
    """One visual token an image: what the tower itself makes of its states, transformers' `pooler_output`. CLIP's is
    its [cls] behind the final norm; others attend to all patches."""

    def __init__(
        self,
        clip: Any,
        activation_checkpointing: bool = False,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(clip, clip.config.num_hidden_layers, activation_checkpointing, preprocessing)
        if self.tower.pool is None or not all(hasattr(clip, name) for name in self.tower.after):
            raise InputError(
                f"model.vision.tokens: found 'pooler', but a {self.tower.title} has no pooler; take patches"
            )

    @property
    def num_tokens(self) -> int:
        return 1

    @property
    def reads_all(self) -> bool:
        return True

    def forward(self, pixels: Tensor) -> Tensor:
        assert self.tower.pool is not None
        return self.tower.pool(self.clip, self._last_states(pixels))[:, None]


VISUAL_TOKENS: dict[str, Callable[[Any, VisionConfig, bool, Preprocessing], VisualTokens]] = {
    "cls": lambda clip, config, *more: ClsTaps(clip, config.tap_every, *more),
    "patches": lambda clip, config, *more: Patches(clip, config.blocks, config.pool, *more),
    "pooler": lambda clip, config, *more: Pooler(clip, *more),
}
"""By `model.vision.tokens`: (network, settings, activation checkpointing, preprocessing) -> module."""
