"""What a person looks at after a run: a page, plots, and pictures of answers.

`html` fills the page of a run, `page` draws it, `pictures` and `plots` draw images.
"""

__all__ = ["html", "page", "pictures", "plots", "remake"]
