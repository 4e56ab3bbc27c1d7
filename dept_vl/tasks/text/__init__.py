"""The text tasks of the paper (GLUE, SuperGLUE, MRQA, ...), all in one table.

`table` lists them, `task` is the one class, `source` reads their files or the Hub.
"""

__all__ = ["source", "table", "task"]
