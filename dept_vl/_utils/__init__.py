"""Internal utilities of all packages: files, tensors, images, statistics, tables.

They do not depend on models, tasks or runs.
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
