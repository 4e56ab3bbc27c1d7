"""Decomposed Prompt Tuning (DePT) for vision-language models.

`dept_vl.api` lists the public names; each is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dept_vl.adapters.adapter import Adapter as Adapter
    from dept_vl.adapters.attach import Attached as Attached
    from dept_vl.adapters.attach import attach as attach
    from dept_vl.api import build_prompt as build_prompt
    from dept_vl.api import evaluate as evaluate
    from dept_vl.api import train as train
    from dept_vl.config import RunConfig as RunConfig
    from dept_vl.inference.loading import load as load
    from dept_vl.inference.mixed import load_many as load_many
    from dept_vl.inference.predictor import Predictor as Predictor
    from dept_vl.models.backbone import Backbone as Backbone
    from dept_vl.models.pretrained_vlm import VisionLanguageModel as VisionLanguageModel
    from dept_vl.models.prompted import PromptedModel as PromptedModel
    from dept_vl.prompts.base import register_method as register_method
    from dept_vl.prompts.dept import DePT as DePT
    from dept_vl.tasks import load_task as load_task
    from dept_vl.tasks import register_task as register_task

__version__ = "0.2.0.dev0"
_MODULES = {
    "Adapter": "adapters.adapter",
    "Attached": "adapters.attach",
    "Backbone": "models.backbone",
    "DePT": "prompts.dept",
    "Predictor": "inference.predictor",
    "PromptedModel": "models.prompted",
    "RunConfig": "config",
    "VisionLanguageModel": "models.pretrained_vlm",
    "attach": "adapters.attach",
    "build_prompt": "api",
    "evaluate": "api",
    "load": "inference.loading",
    "load_many": "inference.mixed",
    "load_task": "tasks",
    "register_method": "prompts.base",
    "register_task": "tasks",
    "train": "api",
}
"""Module of `dept_vl` that defines each public name."""
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dept_vl' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"dept_vl.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
