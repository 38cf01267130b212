"""What users would pick instead: transformers' Trainer on padded batches, and TRL's packing; held a step at a time.

They train the very model of the recipe, adapters and all, with the same optimizer and precision. What differs is what
is measured: how samples become batches, which positions the head and the loss see, and the loop. Each runs in a thread
of its own that stands still between steps, so that a run is a whole step of its real loop, data and logging included,
and competitors can take turns.
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from tests.benchmarks.samples import Samples
from vltrain.config.schema import Config
from vltrain.data.images import decode_image
from vltrain.models.build import build_model
from vltrain.models.mmt.model import MultimodalModel
from vltrain.ops.liger import install_liger
from vltrain.schema import IGNORE_INDEX, Segment

PAD = 0


class PaddedModel(nn.Module):
    """The recipe's model as a plain PyTorch user would write it: padded batches in, transformers' own loss over all
    logits out."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixels: Tensor,
        image_slots: Tensor,
        **more: Any,
    ) -> Any:
        """`input_ids`, `attention_mask`, `labels` [B, L], not shifted; `pixels` [N, 3, H, W]; `image_slots` [K]."""
        embeds = self.model.embed(input_ids.flatten(), self.model.encode_images(pixels), image_slots).unflatten(
            0, input_ids.shape
        )
        return self.model.llm(
            inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, use_cache=False, **more
        )


def peer_model(config: Config, dtype: torch.dtype) -> MultimodalModel:
    """The recipe's model with transformers' own head and attention instead of ours."""
    model = build_model(config.model, dtype=dtype)
    model.llm.lm_head = plain_head(model.llm.lm_head)
    model.llm.set_attn_implementation("sdpa")
    return model


def plain_head(ours: nn.Module) -> nn.Linear:
    """torch's own layer with our head's weight."""
    weight: Any = ours.weight
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = weight
    return head


class PaddingCollator:
    """Samples to a padded batch. `length`: pad (and cut) to that many tokens; None: to the longest of the batch."""

    def __init__(self, samples: Samples, image_size: int, max_image_pixels: int, length: int | None) -> None:
        self._pictures, self._image_size, self._max_image_pixels, self._length = (
            samples.pictures,
            image_size,
            max_image_pixels,
            length,
        )

    def __call__(self, segments: list[Segment]) -> dict[str, Tensor]:
        width = self._length or max(len(segment.input_ids) for segment in segments)
        shape = (len(segments), width)
        batch = {
            "input_ids": torch.full(shape, PAD),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        for place, segment in enumerate(segments):
            ids = torch.from_numpy(segment.input_ids[:width].astype("int64"))
            batch["input_ids"][place, : len(ids)] = ids
            batch["attention_mask"][place, : len(ids)] = 1
            batch["labels"][place, : len(ids)] = ids.masked_fill(
                ~torch.from_numpy(segment.loss_mask[: len(ids)]), IGNORE_INDEX
            )
        names = [name for segment in segments for name in segment.images]
        pixels = [
            torch.from_numpy(decode_image(self._pictures[name], self._image_size, self._max_image_pixels, name))
            for name in names
        ]
        empty = torch.empty(0, 3, self._image_size, self._image_size, dtype=torch.uint8)
        return {**batch, "pixels": torch.stack(pixels) if pixels else empty, "image_slots": torch.arange(len(names))}


class Held(TrainerCallback):
    """A Trainer that makes a step when told to.

    Args:
        trainer: not yet started.
        model: whose inputs are counted: tokens that are no padding.
    """

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._tokens: int | Tensor = 0
        self._stopping = False
        self.losses: list[Tensor] = []
        trainer.add_callback(self)
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        model.register_forward_hook(self._note_loss)
        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, args=(trainer, threads), daemon=True)
        self._thread.start()

    def step(self) -> int | Tensor:
        """One step of the loop, whole. Returns the useful tokens that went in, a number on the model's device: whoever
        reads it waits for the device."""
        self._tokens = 0
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._tokens

    def stop(self) -> None:
        """Ends the loop and the thread."""
        self._stopping = True
        self._go.release()
        self._thread.join()

    def _run(self, trainer: Trainer, threads: int) -> None:
        torch.set_num_threads(threads)  # a thread's own setting
        self._go.acquire()
        try:
            trainer.train()
        except BaseException as error:  # handed to the thread that asked for the step
            self._error = error
        self._done.release()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self._done.release()
        self._go.acquire()
        control.should_training_stop = self._stopping
        return control

    def _count(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        self._tokens = self._tokens + (mask.sum() if mask is not None else named["input_ids"].numel())

    def _note_loss(self, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if getattr(output, "loss", None) is not None:
            self.losses.append(output.loss.detach())  # read later: the device need not be waited for


def training_arguments(config: Config, dtype: torch.dtype, batch_size: int, folder: Path) -> dict[str, Any]:
    """Trainer's settings that make it optimise as the recipe does."""
    optim = config.optim
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "learning_rate": optim.lr,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "max_grad_norm": optim.clip,
        "max_steps": 1_000_000,
        "bf16": dtype == torch.bfloat16,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": config.train.log_every_steps,
        "logging_strategy": "steps",
        "log_level": "error",
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
    }


class GroupedTrainer(Trainer):
    """Trainer with `train_sampling_strategy="group_by_length"`, whose batches come in any order.

    transformers' own sampler begins with the longest samples of each some fifty batches; the few steps of a benchmark
    would see nothing else.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> list[int]:
        size = self.args.train_batch_size
        generator = torch.Generator().manual_seed(0)
        order = list(
            LengthGroupedSampler(size, lengths=[len(one.input_ids) for one in self.train_dataset], generator=generator)
        )
        batches = [order[first : first + size] for first in range(0, len(order) - size + 1, size)]
        return [
            number for batch in torch.randperm(len(batches), generator=generator).tolist() for number in batches[batch]
        ]


def padding_trainer(
    config: Config,
    samples: Samples,
    dtype: torch.dtype,
    *,
    batch_size: int,
    length: int | None,
    folder: Path,
    grouped: bool = False,
    accumulate: int = 1,
    liger: bool = False,
) -> Held:
    """transformers' Trainer; padded to the batch's longest, or to `length`; `grouped`: samples of like lengths share a
    batch; `accumulate`: batches of a step; `liger`: with Liger's patches, which want a GPU."""
    model = PaddedModel(peer_model(config, dtype))
    if liger:
        patch_by_liger(model.model.llm)
    arguments = {**training_arguments(config, dtype, batch_size, folder), "gradient_accumulation_steps": accumulate}
    trainer = (GroupedTrainer if grouped else Trainer)(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=samples.segments,
        data_collator=PaddingCollator(samples, model.model.image_size, config.data.max_image_pixels, length),
    )
    return Held(trainer, model)


def patch_by_liger(llm: Any) -> None:
    """What Liger's patch of a LLaMA does (norms, rotary embedding, SwiGLU, head and loss in one), to this one alone:
    its own patch of rotary embeddings would reach every LLaMA of the process."""
    from liger_kernel.transformers.model.llama import lce_forward

    install_liger(llm)
    llm.forward = MethodType(lce_forward, llm)


def trl_trainer(
    config: Config,
    samples: Samples,
    dtype: torch.dtype,
    *,
    folder: Path,
    pack_length: int | None = None,
    batch_size: int = 1,
    accumulate: int = 1,
) -> Held:
    """TRL's SFTTrainer, text only: it packs nothing else.

    `pack_length`: its best-fit-decreasing packing, one pack a step; None: `padding_free`, batches of `batch_size`
    samples behind one another in a row, `accumulate` of them a step. Both restart positions with each sample, and
    score, without keeping logits, what its own fused head takes.

    Our placeholder of the modality token becomes an ordinary token, since the model alone is TRL's.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    rows = [
        {
            "input_ids": segment.input_ids.clip(min=PAD).tolist(),
            "labels": [
                int(one) if wanted else IGNORE_INDEX
                for one, wanted in zip(segment.input_ids, segment.loss_mask, strict=True)
            ],
        }
        for segment in samples.segments
    ]
    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")
    )  # the samples are tokens already
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    llm = peer_model(config, dtype).llm
    arguments = {
        **training_arguments(config, dtype, batch_size, folder),
        "gradient_accumulation_steps": accumulate,
        "packing": pack_length is not None,
        "padding_free": pack_length is None,
        "max_length": pack_length,
        "remove_unused_columns": True,
    }
    trainer = SFTTrainer(
        model=llm, args=SFTConfig(**arguments), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return Held(trainer, llm)
