"""From examples to batches: splits, shots, collating, sampling, workers, visual features.

`collate` makes batches, `sampling` sets the order of examples, and `check_own` reports on your own data.
"""

__all__ = [
    "answers",
    "check_own",
    "collate",
    "content",
    "encoded",
    "feature_index",
    "feature_source",
    "feature_store",
    "features",
    "lengths",
    "pictures",
    "sampling",
    "shots",
    "splits",
    "workers",
]
