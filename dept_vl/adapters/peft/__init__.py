"""DePT as a method of PEFT. Import `plugin`, then use `DeptConfig` like a `LoraConfig`.

`plugin` registers the method, `layer` has its modules, and `files` reads and writes PEFT's files.
"""

__all__ = ["files", "layer", "plugin"]
