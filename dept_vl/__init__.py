"""DePT, Decomposed Prompt Tuning, for encoder-decoder vision-language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dept_vl.adapters.adapter import Adapter
    from dept_vl.inference.loading import load
    from dept_vl.inference.mixed import load_many
    from dept_vl.models.backbone import Backbone
    from dept_vl.models.prompted import PromptedModel
    from dept_vl.prompts.budget import register_method
    from dept_vl.prompts.dept import DePT

__version__ = "0.1.0"
__all__ = ["Adapter", "Backbone", "DePT", "PromptedModel", "load", "load_many", "register_method"]

_ROOMS = {
    "Adapter": "adapters.adapter",
    "Backbone": "models.backbone",
    "DePT": "prompts.dept",
    "PromptedModel": "models.prompted",
    "load": "inference.loading",
    "load_many": "inference.mixed",
    "register_method": "prompts.budget",
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import dept_vl` alone costs nothing.
    if name in _ROOMS:
        return getattr(import_module(f"dept_vl.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'dept_vl' has no attribute {name!r}")
