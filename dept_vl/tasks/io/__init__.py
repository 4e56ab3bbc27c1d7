"""Annotation and prediction files: read as a stream, kept as Arrow rows, written for servers.

Files come from strangers, so everything is checked as it is read.
"""

__all__ = ["official_files", "predictions", "records", "rows", "submission"]
