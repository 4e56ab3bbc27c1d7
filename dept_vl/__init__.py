"""DePT, Decomposed Prompt Tuning, for encoder-decoder vision-language models."""

__version__ = "0.1.0"
