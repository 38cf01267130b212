"""Pretrains the tiny vision transformer: on drawings of our own, every tap of [cls] must tell what is drawn.

The visual tokens of the model are the [cls] states behind every block, so every one of them gets its own linear heads:
figure, colour and place. The patches get heads of their own, figure and outline, which makes figures be learned several
times sooner than from [cls] alone. Drawings begin large and centred on pale grounds and become as varied as they get by
half of the training: without that, figures stay at chance for a long time. All heads are thrown away. Trade-off:
it knows nothing but plain figures.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from data_prep.pretrain.drawings import COLOURS, FIGURES, IMAGE_SIZE, draw

VIT_CONFIG = {
    "image_size": IMAGE_SIZE,
    "patch_size": 16,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}
MIN_SHARE = 0.02  # a patch must be covered by this much of a figure to be asked which


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """pixels uint8 [N, 3, 64, 64]; figure, colour int64 [N]; place float32 [N, 3]; mask bool [N, P, pixels of a
    patch]."""

    pixels: torch.Tensor
    figure: torch.Tensor
    colour: torch.Tensor
    place: torch.Tensor
    mask: torch.Tensor


def draw_many(rng: np.random.Generator, count: int, variety: float = 1.0) -> Drawings:
    drawings = [draw(rng, variety) for _ in range(count)]
    patch = VIT_CONFIG["patch_size"]
    mask = torch.from_numpy(np.stack([drawing.mask for drawing in drawings]))
    mask = mask.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).flatten(1, 2)
    return Drawings(
        pixels=torch.from_numpy(np.stack([drawing.pixels for drawing in drawings])),
        figure=torch.tensor([drawing.figure for drawing in drawings]),
        colour=torch.tensor([drawing.colour for drawing in drawings]),
        place=torch.tensor([drawing.place for drawing in drawings]),
        mask=mask,
    )


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> float32 of the same shape, as the model does it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels.float() / 255 - mean) / std


def states(vit: CLIPVisionModel, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """uint8 [N, 3, H, W] -> for each block float32 [N, 1 + P, d]: [cls] and the P patches behind it."""
    return vit(pixel_values=normalise(pixels), output_hidden_states=True).hidden_states[1:]


class Heads(nn.Module):
    """Linear readings of the states behind one block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.patch_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.figure, self.colour, self.place = (nn.Linear(width, n) for n in (len(FIGURES), len(COLOURS), 3))
        self.patch_figure, self.patch_mask = (
            nn.Linear(width, n) for n in (len(FIGURES), VIT_CONFIG["patch_size"] ** 2)
        )

    def read(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[N, 1 + P, d] -> what [cls] tells: logits of figures and colours, and the place."""
        cls = self.norm(state[:, 0])
        return self.figure(cls), self.colour(cls), self.place(cls)

    def loss(self, state: torch.Tensor, drawings: Drawings) -> torch.Tensor:
        figures, colours, place = self.read(state)
        cls_loss = (
            F.cross_entropy(figures, drawings.figure)
            + F.cross_entropy(colours, drawings.colour)
            + F.l1_loss(place, drawings.place)
        )
        patches = self.patch_norm(state[:, 1:])
        mask = drawings.mask.float()
        covered = mask.mean(-1) > MIN_SHARE
        labels = drawings.figure[:, None].expand_as(covered)[covered]
        mask_loss = F.binary_cross_entropy_with_logits(self.patch_mask(patches), mask)
        return cls_loss + F.cross_entropy(self.patch_figure(patches[covered]), labels) + mask_loss


def train_vit(
    *, num_steps: int, batch_size: int = 64, lr: float = 1e-3, seed: int = 0
) -> tuple[CLIPVisionModel, dict[str, float]]:
    """Returns the trained ViT and its accuracy on fresh drawings, by the heads of each tap."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vit = CLIPVisionModel(CLIPVisionConfig(**VIT_CONFIG))
    heads = [Heads(VIT_CONFIG["hidden_size"]) for _ in range(VIT_CONFIG["num_hidden_layers"])]
    parameters = [*vit.parameters(), *(one for head in heads for one in head.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(num_steps):
        drawings = draw_many(rng, batch_size, variety=min(1.0, 2 * step / num_steps))
        loss = torch.stack(
            [head.loss(state, drawings) for state, head in zip(states(vit, drawings.pixels), heads, strict=True)]
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == num_steps - 1:
            share = evaluate(vit, heads, drawings)[f"figure_{len(heads)}"]
            print(
                f"vit step {step}/{num_steps} loss {loss.item():.4f} figures {share:.2f} "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    return vit, evaluate(vit, heads, draw_many(rng, 2000))


@torch.no_grad()
def evaluate(vit: CLIPVisionModel, heads: list[Heads], drawings: Drawings) -> dict[str, float]:
    """Share of figures and colours told right, by number of the tap."""
    scores = {}
    for number, (state, head) in enumerate(zip(states(vit, drawings.pixels), heads, strict=True), start=1):
        figures, colours, _ = head.read(state)
        scores[f"figure_{number}"] = (figures.argmax(1) == drawings.figure).float().mean().item()
        scores[f"colour_{number}"] = (colours.argmax(1) == drawings.colour).float().mean().item()
    return scores
