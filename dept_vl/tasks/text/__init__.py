"""The text tasks of DePT's paper (GLUE, SuperGLUE, MRQA and others).

`table` defines the tasks, `task` is their class, and `source` reads their files or the Hub.
"""

__all__ = ["source", "table", "task"]
