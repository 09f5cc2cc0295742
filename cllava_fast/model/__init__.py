"""The only place that knows transformers models, but for a CLIP (``clip.py``): paths, patch, merge, files, export."""

from cllava_fast.model.export import ExportReport, export_peft
from cllava_fast.model.files import load_pretrained, save_pretrained
from cllava_fast.model.hub import from_pretrained, push_to_hub
from cllava_fast.model.layer_scaling import LayerScaling, scale_layers
from cllava_fast.model.merging import MergeReport, merge, unmerge
from cllava_fast.model.patching import get_increments, patch, unpatch
from cllava_fast.model.sharing import share

__all__ = [
    "ExportReport",
    "LayerScaling",
    "MergeReport",
    "export_peft",
    "from_pretrained",
    "get_increments",
    "load_pretrained",
    "merge",
    "patch",
    "push_to_hub",
    "save_pretrained",
    "scale_layers",
    "share",
    "unmerge",
    "unpatch",
]
