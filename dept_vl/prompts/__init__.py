"""The methods: soft prompts and offsets on frozen word embeddings.

`dept` is DePT (Shi & Lipani, ICLR 2024), `methods` has it and its relatives, one class each, `sources` their
modules, `budget` their registry and sizes, `initialise` what their vectors start from.
"""

__all__ = ["budget", "dept", "initialise", "methods", "sources"]
