"""Report of a run: an HTML page, and plots.

`html` collects the content of the page, `page` has its templates and charts, `plots` draws images with
matplotlib.
"""

__all__ = ["html", "page", "plots", "remake"]
