"""DePT, Decomposed Prompt Tuning, for encoder-decoder vision-language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dept_vl.backbone import Backbone
    from dept_vl.checkpoint import Adapter
    from dept_vl.dept import DePT
    from dept_vl.many import load_many
    from dept_vl.model import PromptedModel
    from dept_vl.predict import load

__version__ = "0.1.0"
__all__ = ["Adapter", "Backbone", "DePT", "PromptedModel", "load", "load_many"]

_ROOMS = {
    "Adapter": "checkpoint",
    "Backbone": "backbone",
    "DePT": "dept",
    "PromptedModel": "model",
    "load": "predict",
    "load_many": "many",
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import dept_vl` alone costs nothing.
    if name in _ROOMS:
        return getattr(import_module(f"dept_vl.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'dept_vl' has no attribute {name!r}")
