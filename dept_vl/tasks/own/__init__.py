"""Tasks on your own images and questions: tables with a folder of images, `--data FILE|FOLDER|HUB_NAME`.

`options` defines the options, `find` finds tables and splits, `readers` reads tables, `formats` reads the
files of other data sets, `columns` turns records into rows, `choices` finds the correct choice, `classes`
names of classes, `convert` caches the rows, `images` finds image files, and `task` defines the task class.
"""

__all__ = [
    "choices",
    "classes",
    "columns",
    "conversations",
    "convert",
    "find",
    "formats",
    "images",
    "inline",
    "options",
    "readers",
    "split",
    "task",
]
