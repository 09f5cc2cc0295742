"""Pretrains the demo's base from nothing, in minutes: ``python -m cllava_fast.demo.pretrain --output DIR``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor, get_cosine_schedule_with_warmup

from cllava_fast.atomic import check_replaceable, new_folder
from cllava_fast.data.encode import Collator, Encoder
from cllava_fast.data.stream import Sample
from cllava_fast.demo.base import new_base
from cllava_fast.demo.mixture import draw_example
from cllava_fast.demo.tokenizer import build_processor
from cllava_fast.train.progress import stage

FILES = (
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class PretrainArguments:
    steps: int = 2600
    batch_size: int = 48
    learning_rate: float = 3e-3  # of the hidden matrices
    adamw_learning_rate: float = 1.5e-3  # of everything else
    warmup: int = 100
    seed: int = 0
    workers: int = 1


class _Batches(Dataset[dict[str, Tensor]]):
    """Batch ``step`` is drawn from (seed, step) alone, whichever process draws it."""

    def __init__(self, arguments: PretrainArguments, processor: LlavaProcessor) -> None:
        self.arguments = arguments
        self.encoder = Encoder(processor)
        self.collate = Collator(self.encoder, None, training=True)

    def __len__(self) -> int:
        return self.arguments.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = Random(f"pretrain/{self.arguments.seed}/{step}")
        drawn = [draw_example(rng) for _ in range(self.arguments.batch_size)]
        samples = [Sample(prompt, answer, image) for image, (prompt, answer) in drawn]
        return self.collate(self.encoder.encode(samples))


def pretrain(arguments: PretrainArguments) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Everything trains: vision tower, projector and language model."""
    processor = build_processor()
    model = new_base(processor, arguments.seed).train()
    optimizers = _optimizers(model, arguments)
    schedules = [get_cosine_schedule_with_warmup(o, arguments.warmup, arguments.steps) for o in optimizers]
    batches = DataLoader(_Batches(arguments, processor), batch_size=None, num_workers=arguments.workers)
    with stage("pretrain", arguments.steps) as advance:
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in (*optimizers, *schedules):
                part.step()
            model.zero_grad()
            advance(f"loss {loss.item():.3f}")
    return model.eval(), processor


def _optimizers(model: LlavaForConditionalGeneration, arguments: PretrainArguments) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the hidden matrices: it needs about two thirds of the steps of AdamW alone."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.dim() == 2 and "embed" not in name and "lm_head" not in name
        (hidden if is_hidden else rest).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=arguments.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=arguments.adamw_learning_rate, weight_decay=0.01, fused=True),
    ]


def save_base(model: LlavaForConditionalGeneration, processor: LlavaProcessor, output: Path) -> None:
    """Writes the whole folder or nothing; a base that is there already is replaced."""
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # some come readable by their owner alone


def main(argv: Sequence[str] | None = None) -> None:
    defaults = PretrainArguments()
    parser = argparse.ArgumentParser(description="Pretrain the demo's base model from nothing.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; replaced if it holds a base")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    given = vars(parser.parse_args(argv))
    output: Path = given.pop("output")
    try:
        check_replaceable(output, FILES, "a base model")
    except FileExistsError as error:
        parser.error(str(error))
    save_base(*pretrain(PretrainArguments(**given)), output)


if __name__ == "__main__":
    main()
