"""Faults, each planted in a trainer that is whole otherwise: what a careless edit of vltrain, of a model or of the data
could bring."""

import numpy as np
import torch

from vltrain.data import loader
from vltrain.data.plan import Plan
from vltrain.models.mmt.model import MultimodalModel
from vltrain.train.zero.engine import Engine


def leaking_mask(patch, trainer):
    """All segments of a pack are one to the attention."""
    from vltrain.models.mmt import model

    packed = model.packed_hidden_states
    whole = lambda llm, embeds, positions, lengths: packed(llm, embeds, positions, lengths.sum().reshape(1))
    patch.setattr(model, "packed_hidden_states", whole)


def positions_that_go_on(patch, trainer):
    patch.setattr(loader, "_positions", lambda row, counted: loader.tensor_of(np.arange(len(counted))))


def loss_scaled_by_ranks(patch, trainer):
    """DeepSpeed's mean over ranks is left as it is."""
    backward = Engine.backward

    def averaged(self, loss, *, last_micro_step):
        backward(self, loss / self.world_size, last_micro_step=last_micro_step)

    patch.setattr(Engine, "backward", averaged)


def loss_of_own_labels(patch, trainer):
    """Each micro-step is divided by its own label tokens, not by the step's."""
    forward = trainer.engine.forward

    def own(batch, **options):
        output = forward(batch, **options)
        return output._replace(loss_sum=output.loss_sum * 2.0)

    patch.setattr(trainer.engine, "forward", own)


def rank_without_images(patch, trainer):
    """Only ranks whose own pack shows an image read one."""
    share = loader._share

    def own(step, rank):
        shown = trainer.loader.dataset.index.num_images
        return [(pack, pack >= 0 and bool(shown[pack])) for pack, _ in share(step, rank)]

    patch.setattr(loader, "_share", own)
    patch.setattr(Plan, "reads_images", lambda self, packs: np.zeros(len(packs), bool))


def pack_too_large(patch, trainer):
    forward = trainer.engine.model.forward

    def limited(batch, **options):
        if len(batch.input_ids) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return forward(batch, **options)

    patch.setattr(trainer.engine.model, "forward", limited)


def frozen_tower_that_moves(patch, trainer):
    """Something writes into the ViT with each step."""
    step = trainer.engine.step

    def moving():
        step()
        weight = next(one for name, one in trainer.engine.model.named_parameters()
                      if name.startswith("vision.") and not one.requires_grad)  # fmt: skip
        with torch.no_grad():
            getattr(weight, "ds_tensor", weight).mul_(1.001)

    patch.setattr(trainer.engine, "step", moving)


def adapter_without_gradient(patch, trainer):
    """The first adapter of the LLM is called, and its result thrown away."""
    adapter = next(module for name, module in trainer.engine.model.named_modules()
                   if name.startswith("llm.") and name.endswith(".adapter"))  # fmt: skip
    patch.setattr(adapter, "forward", lambda states, norm=None: states if norm is None else norm(states))


def adapter_that_text_does_not_reach(patch, trainer):
    """A blank image is left out where no token shows it."""
    embed = MultimodalModel.embed
    left_out = lambda self, ids, visual, slots: embed(self, ids, visual if len(slots) else visual[:0], slots)
    patch.setattr(MultimodalModel, "embed", left_out)


def gradient_that_is_nan(patch, trainer):
    forward = trainer.engine.model.forward

    def broken(batch, **options):
        output = forward(batch, **options)
        return output._replace(loss_sum=output.loss_sum * float("nan"))

    patch.setattr(trainer.engine.model, "forward", broken)


FAULTS = {
    one.__name__: one
    for one in (
        leaking_mask, positions_that_go_on, loss_scaled_by_ranks, loss_of_own_labels, rank_without_images,
        pack_too_large, frozen_tower_that_moves, adapter_without_gradient, adapter_that_text_does_not_reach,
        gradient_that_is_nan,
    )
}  # fmt: skip
