"""Learns a stream of tasks with a LLaVA, on one device or many.

    python examples/train.py --output_dir runs/mine
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train.py \\
        --model llava-hf/llava-1.5-7b-hf --stream stream.yaml --output_dir runs/mine --bf16

Every field of ``ContinualArguments`` but ``trainer_options`` is an option: ``python examples/train.py --help``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from accelerate import Accelerator, DistributedType
from transformers import AutoProcessor, HfArgumentParser, LlavaForConditionalGeneration

import cllava_fast as cf
from cllava_fast.demo.base import FOLDER


@dataclass
class ScriptArguments:
    """What is learned, and by what."""

    model: str = field(default=str(FOLDER), metadata={"help": "A LLaVA, by folder or hub name; default: the demo's."})
    stream: str = field(
        default="demo",
        metadata={"help": "A stream's YAML file, of which the stream alone is read, or demo for its four tasks."},
    )
    limit: int = field(default=0, metadata={"help": "Samples of each split, the first ones; 0 for all."})
    scale: float = field(default=1.0, metadata={"help": "Factor on every increment."})
    a_std: float = field(default=1.0, metadata={"help": "Standard deviation of A at birth."})


def load_stream(name: str, limit: int) -> cf.Stream:
    if name == "demo":
        from cllava_fast.demo.stream import build_stream

        return build_stream(seed=0, train=limit or 1200, test=limit or 200)
    from cllava_fast.data import load_stream

    stream = load_stream(name)
    if not limit:
        return stream
    return cf.Stream([replace(task, train=task.train[:limit], test=task.test[:limit]) for task in stream], stream.name)


def main(argv: Sequence[str] | None = None) -> cf.ContinualResult:
    parser = HfArgumentParser((ScriptArguments, cf.ContinualArguments))
    script, args = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else list(argv))

    model = LlavaForConditionalGeneration.from_pretrained(script.model, dtype="auto")
    if Accelerator().distributed_type != DistributedType.FSDP:  # which moves the model in shards
        model.to(Accelerator().device)
    processor = AutoProcessor.from_pretrained(script.model)
    cf.patch(model, cf.IncrementConfig(scale=script.scale, a_std=script.a_std), processor=processor)

    result = cf.ContinualTrainer(model, processor, load_stream(script.stream, script.limit), args).train()
    if Accelerator().is_main_process:
        print(f"average accuracy {result.average_accuracy:.3f}, forgetting {result.average_forgetting}")
    Accelerator().end_training()
    return result


if __name__ == "__main__":
    main()
