"""A tiny LLaVA and streams of small tasks, so that the main job runs anywhere.

``build_stream`` gives the tasks of the default setting, ``settings`` those of all three; ``load_base`` the model;
``pretrain`` makes the model again from nothing.
"""

from cllava_fast.demo.base import load_base
from cllava_fast.demo.stream import build_stream

__all__ = ["build_stream", "load_base"]
