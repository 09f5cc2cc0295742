"""What makes a run that run: ``run.json`` holds it, and a run goes on with the same alone."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from safetensors.torch import save

from cllava_fast import distributed
from cllava_fast.data.stream import Stream, fingerprint
from cllava_fast.methods import MethodConfig
from cllava_fast.model import get_increments
from cllava_fast.model.files import base_fingerprint
from cllava_fast.model.processors import image_settings
from cllava_fast.pool import Pool
from cllava_fast.train.arguments import ContinualArguments


def run_identity(method: MethodConfig, args: ContinualArguments, stream: Stream) -> dict[str, Any]:
    """What makes a run that run, as ``run.json`` holds it; of several processes, once they are connected."""
    arguments = args.identity()
    # so that a run may go on with fewer processes and more samples on each
    per_device, accumulated = (
        arguments.pop(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    arguments["train_batch_size"] = per_device * accumulated * distributed.count()
    return {
        "method": method.to_dict(),
        "arguments": arguments,
        "stream": {task.name: [len(task.train), len(getattr(task, args.eval_split))] for task in stream},
        "metrics": {task.name: task.metric for task in stream},
        # of each task what it learns and what it is measured on
        "stream_sha256": [[fingerprint(task.train), fingerprint(getattr(task, args.eval_split))] for task in stream],
    }


def base_identity(model: Any, processor: Any) -> dict[str, Any]:
    """The part of a run's identity that takes the patched base to know, and what is said to it."""
    surrogate = get_increments(model).surrogate
    return {
        "base_fingerprint": base_fingerprint(model),
        "surrogate_fingerprint": None if surrogate is None else surrogate.fingerprint,
        **processor_identity(processor),
    }


def processor_identity(processor: Any) -> dict[str, Any]:
    """How prompts are written and images prepared."""
    template = getattr(processor, "chat_template", None)
    return {
        "chat_template_sha256": hashlib.sha256(json.dumps(template).encode()).hexdigest(),
        "image_settings": image_settings(processor),
    }


def learned_before(pool: Pool) -> dict[str, Any] | None:
    """The part of a run's identity that is what the model has learned when the run begins."""
    if not pool.num_tasks and not pool.block_rows:
        return None
    return {"tasks": list(pool.task_names), "sha256": hashlib.sha256(save(pool.state())).hexdigest()}
