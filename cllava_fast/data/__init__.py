"""Samples, tasks and streams, and how they become batches."""

from cllava_fast.data.stream import Sample, Stream, Task

__all__ = ["Sample", "Stream", "Task"]
