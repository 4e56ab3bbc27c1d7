"""Your own images and questions: any usual table and folder of images, `--data FILE|FOLDER|HUB_NAME`.

`options` says what may be set, `files` finds tables and splits, `tables` reads them, `formats` knows the
files of other data sets, `columns` makes rows of records, `convert` keeps them, `images` finds image files,
`task` is the one class.
"""

__all__ = [
    "columns",
    "conversations",
    "convert",
    "files",
    "formats",
    "images",
    "inline",
    "options",
    "split",
    "tables",
    "task",
]
