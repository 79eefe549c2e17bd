"""A method by its name and the names of its settings: what the command line and tables of all methods need."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from minift.adapters.config import LoraConfig
from minift.adapters.method import Method
from minift.adapters.verbs import METHODS

LORA = "lora"
NAMED: dict[str, Any] = {LORA: LoraConfig, **{method.name: method for method in METHODS}}


def method_named(name: str, settings: Mapping[str, Any] | None = None) -> LoraConfig | Method:
    """The settings of a method.

    Args:
        name: "lora", "ia3", ...
        settings: values of its fields; those not given have their defaults.

    Raises:
        ValueError: an unknown method or setting (lists those there are), or a value out of range.
    """
    if name not in NAMED:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(NAMED)}")
    known = [field.name for field in fields(NAMED[name])]
    unknown = [key for key in settings or {} if key not in known]
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return NAMED[name](**settings or {})


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """["use_dora=true", "init=pissa", 'target_modules=["q_proj"]'] -> values: JSON where that is what it is, else text.

    Raises:
        ValueError: no "=", or the same name twice.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{text!r} is no setting: write NAME=VALUE, for instance use_dora=true")
        if name in settings:
            raise ValueError(f"the setting {name!r} is given twice")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings
