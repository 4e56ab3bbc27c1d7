"""What every package uses and none is about: files, tensors, images, statistics, tables.

Internal; nothing here knows of models, tasks or runs.
"""

__all__ = [
    "checksums",
    "embedded",
    "errors",
    "flags",
    "images",
    "io",
    "options",
    "printable",
    "processes",
    "registry",
    "run_files",
    "stats",
    "tables",
    "tensors",
    "terminal",
]
