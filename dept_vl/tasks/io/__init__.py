"""Annotation and prediction files: read as a stream, stored as Arrow rows, written for servers.

All content is checked while it is read, since files may come from anyone.
"""

__all__ = ["files", "predictions", "records", "rows"]
