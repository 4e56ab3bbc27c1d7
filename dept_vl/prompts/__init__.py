"""The methods: soft prompts and offsets on frozen word embeddings.

`dept` is DePT (Shi & Lipani, ICLR 2024). `base` says what a method is and what its budget buys, `methods`
has the built-in ones, `reparameterized` computes P from other parameters, and `initialise` gives P its first
vectors.
"""

__all__ = ["base", "dept", "initialise", "methods", "options", "reparameterized"]
