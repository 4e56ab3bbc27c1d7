"""DePT as a method of PEFT: import `plugin`, then use `DeptConfig` like a `LoraConfig`.

`plugin` registers the method, `layer` runs it, `files` converts adapters between PEFT's form and ours.
"""

__all__ = ["files", "layer", "plugin"]
