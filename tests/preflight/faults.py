"""Faults, each planted in a run that is whole otherwise: what a careless edit of vltrain, of a model or of the data
could bring. `plant` takes those that are there before the engine is made and those of a finished trainer alike."""

import functools

import numpy as np
import torch

from vltrain.data import loader
from vltrain.data.plan import Plan
from vltrain.models.mmt.model import MultimodalModel
from vltrain.train import make_trainer
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


def pack_too_large_on_one_rank(patch, trainer):
    """Rank 1 alone has no memory left."""
    if trainer.rank == 1:
        pack_too_large(patch, trainer)


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


def loss_by_pack(patch, trainer):
    """A step's gradient is the mean over its packs of means over their tokens; what is reported is right."""
    forward, backward, seen = trainer.engine.forward, Engine.backward, []

    def remembering(batch, **options):
        seen.append(max(1, batch.num_label_tokens))
        return forward(batch, **options)

    def mean(self, loss, *, last_micro_step):
        backward(self, loss * 4.0 / seen[-1], last_micro_step=last_micro_step)

    patch.setattr(trainer.engine, "forward", remembering)
    patch.setattr(Engine, "backward", mean)


def nan_in_a_weight_that_no_pack_reads(patch, trainer):
    weight = trainer.engine.model.llm.get_input_embeddings().weight
    with torch.no_grad():
        getattr(weight, "ds_tensor", weight).view(-1)[-1] = float("nan")


def infinite_optimizer(patch, trainer):
    """As from a checkpoint of a run that went wrong."""
    trained = trainer.engine.trainable
    zeros = {name: torch.zeros(getattr(one, "ds_shape", one.shape)) for name, one in trained.items()}
    trainer.engine.load_optimizer_state({name: {"exp_avg": one, "exp_avg_sq": one} for name, one in zeros.items()}, 3)
    state = next(iter(trainer.engine.optimizer.state.values()))
    state["exp_avg_sq"].view(-1)[0] = float("inf")


def _dropping(patch, trainer, rate_in):
    """Behind the neck, by a function and not a module with a rate. rate_in: by whether the model is trained."""
    neck = trainer.engine.model.neck
    handle = lambda module, arguments, output: torch.nn.functional.dropout(output, rate_in[module.training])
    patch.setattr(neck, "_forward_hooks", {**neck._forward_hooks, -1: handle})


def dropout_without_a_rate(patch, trainer):
    """What is not named in the recipe, and stays on while packs are compared."""
    _dropping(patch, trainer, {True: 0.1, False: 0.0})


def dropout_in_evaluation(patch, trainer):
    _dropping(patch, trainer, {True: 0.0, False: 0.1})


def images_in_another_order(patch, trainer):
    """Those of a pack come out of the loader last first."""
    fetch = loader._Fetcher.fetch

    def turned(self, number, has_images):
        row, pixels = fetch(self, number, has_images)
        return row, pixels.flip(0) if len(row.image_ids) > 1 else pixels

    patch.setattr(loader._Fetcher, "fetch", turned)


def _changed_model(patch, change):
    """Before the engine is made, of a model that is there."""
    load = make_trainer._load_start

    def changed(model, *rest):
        change(model)
        load(model, *rest)

    patch.setattr(make_trainer, "_load_start", changed)


def tower_that_is_trained(patch):
    """Somebody forgot to freeze the ViT."""

    def unfrozen(model):
        for name, parameter in model.named_parameters():
            if model.part_of(name) == "vision":
                parameter.requires_grad_(True)

    _changed_model(patch, unfrozen)


def tied_by_mistake(patch):
    """Two adapters have one tensor."""

    def tied(model):
        one, other = [module for name, module in model.named_modules() if name.endswith(".adapter")][:2]
        name = next(iter(dict(one.named_parameters())))
        *path, last = name.split(".")
        places = [functools.reduce(getattr, path, module) for module in (one, other)]
        setattr(places[1], last, getattr(places[0], last))

    _changed_model(patch, tied)


def rate_of_nothing(patch):
    """The neck's learning rate is 0."""
    groups = make_trainer.parameter_groups

    def without(named, optim, part_of):
        named = list(named)
        own = [(name, one) for name, one in named if part_of(name) == "neck"]
        rest = groups([(name, one) for name, one in named if part_of(name) != "neck"], optim, part_of)
        return [*rest, *({**group, "lr": 0.0, "peak_lr": 0.0} for group in groups(own, optim, part_of))]

    patch.setattr(make_trainer, "parameter_groups", without)


def part_without_optimizer(patch):
    """The optimizer is not given the neck."""
    groups = make_trainer.parameter_groups
    without = lambda named, optim, part_of: groups(
        [(name, one) for name, one in named if part_of(name) != "neck"], optim, part_of
    )
    patch.setattr(make_trainer, "parameter_groups", without)


FAULTS = {
    one.__name__: one
    for one in (
        leaking_mask, positions_that_go_on, loss_scaled_by_ranks, loss_of_own_labels, rank_without_images,
        pack_too_large, frozen_tower_that_moves, adapter_without_gradient, adapter_that_text_does_not_reach,
        gradient_that_is_nan, loss_by_pack, nan_in_a_weight_that_no_pack_reads, infinite_optimizer,
        dropout_without_a_rate, dropout_in_evaluation,
    )
}  # fmt: skip
BEFORE = {one.__name__: one for one in (tower_that_is_trained, tied_by_mistake, rate_of_nothing,
                                        part_without_optimizer)}  # fmt: skip
BY_COMMAND = {one.__name__: one for one in (images_in_another_order, pack_too_large_on_one_rank)}
"""What the command alone looks for, or ends otherwise."""


def plant(patch, name, make):
    """A trainer with the fault of that name ("" for none), made by `make`."""
    if name in BEFORE:
        BEFORE[name](patch)
    trainer = make()
    if name in FAULTS | BY_COMMAND:
        (FAULTS | BY_COMMAND)[name](patch, trainer)
    return trainer
