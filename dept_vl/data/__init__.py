"""From examples to batches: splits, shots, collating, sampling, workers, visual features.

`collate` makes a batch, `sampling` says which example comes when.
"""

__all__ = [
    "answers",
    "collate",
    "content",
    "feature_index",
    "feature_shards",
    "feature_store",
    "features",
    "lengths",
    "sampling",
    "shots",
    "splits",
    "workers",
]
