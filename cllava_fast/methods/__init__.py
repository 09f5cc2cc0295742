"""Methods by name. To add one: one file in this folder with a config and a policy, under ``@register``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from cllava_fast.methods.base import METHODS, Begun, Method, MethodConfig, Pairs, Selection, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from cllava_fast.methods.continual_llava import ContinualLlava, IncrementConfig  # noqa: E402
from cllava_fast.methods.lora import JointLora, JointLoraConfig, LoraConfig, SequentialLora  # noqa: E402


def make_method(config: MethodConfig) -> Method:
    """The policy that a config asks for."""
    known = METHODS.get(getattr(config, "method", ""))
    if known is None or type(config) is not known[0]:
        names = [entry[0].__name__ for entry in METHODS.values()]
        raise TypeError(f"config is a {type(config).__name__}; expected one of {names}")
    return known[1](config)


def config_from_dict(values: dict[str, Any]) -> MethodConfig:
    """The config that ``MethodConfig.to_dict`` wrote. Raises ValueError for unknown methods or fields."""
    fields = dict(values)
    name = fields.pop("method", None)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(
            f"method is {name!r}; expected one of {sorted(METHODS)}, or import the module that registers it"
        )
    config_class = METHODS[name][0]
    unknown = set(fields) - set(config_class.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)} for method {name!r}")
    return config_class(**fields)


__all__ = [
    "METHODS",
    "Begun",
    "ContinualLlava",
    "IncrementConfig",
    "JointLora",
    "JointLoraConfig",
    "LoraConfig",
    "Method",
    "MethodConfig",
    "Pairs",
    "Selection",
    "SequentialLora",
    "config_from_dict",
    "make_method",
    "register",
]
