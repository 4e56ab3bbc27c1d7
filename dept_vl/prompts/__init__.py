"""Prompt methods: soft prompts, and offsets that are added to frozen word embeddings.

`dept` implements DePT (Shi & Lipani, ICLR 2024). `base` defines the interface of a method and its parameter
budget, `methods` contains the built-in methods, and `initialise` sets the initial vectors of P.
"""

__all__ = ["base", "dept", "initialise", "methods", "options"]
