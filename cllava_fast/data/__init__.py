"""Samples, tasks and streams, and how they become batches."""

from cllava_fast.data.conversation import chat_template
from cllava_fast.data.encode import DataCollator
from cllava_fast.data.load import load_stream, ready_streams
from cllava_fast.data.readers import read_samples
from cllava_fast.data.stream import Sample, Stream, Task
from cllava_fast.model.processors import pad_to_square

__all__ = [
    "DataCollator",
    "Sample",
    "Stream",
    "Task",
    "chat_template",
    "load_stream",
    "pad_to_square",
    "read_samples",
    "ready_streams",
]
