"""What a person looks at after a run: a page and plots.

`html` fills the page of a run, `page` draws it, `plots` draws images, as `data.pictures` does.
"""

__all__ = ["html", "page", "plots", "remake"]
