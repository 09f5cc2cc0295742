"""The only place that knows transformers models: paths, patch, files."""

from cllava_fast.model.files import load_pretrained, save_pretrained
from cllava_fast.model.patching import get_increments, patch, unpatch

__all__ = ["get_increments", "load_pretrained", "patch", "save_pretrained", "unpatch"]
