"""From examples to batches: splits, shots, collating, sampling, workers, visual features.

`collate` makes a batch, `sampling` says which example comes when, `check_own` looks at your own data.
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
