"""The only place that knows transformers models: paths, patch, merge, files."""

from cllava_fast.model.files import load_pretrained, save_pretrained
from cllava_fast.model.merging import MergeReport, merge, unmerge
from cllava_fast.model.patching import get_increments, patch, unpatch

__all__ = [
    "MergeReport",
    "get_increments",
    "load_pretrained",
    "merge",
    "patch",
    "save_pretrained",
    "unmerge",
    "unpatch",
]
