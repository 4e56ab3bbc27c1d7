"""Report of a run: an HTML page, and plots.

`html` writes the page from the templates and charts of `page`; `plots` draws images with matplotlib.
"""

__all__ = ["html", "page", "plots", "remake"]
