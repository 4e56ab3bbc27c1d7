"""The methods: soft prompts and offsets on frozen word embeddings.

`dept` is DePT (Shi & Lipani, ICLR 2024); `methods` is the family around it, `budget` its sizes.
"""

__all__ = ["budget", "dept", "methods"]
