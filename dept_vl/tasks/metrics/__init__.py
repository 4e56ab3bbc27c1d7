"""Scores computed like the official evaluation servers, as pure functions on strings and lists."""

__all__ = ["caption", "gqa", "nlvr2", "own", "text", "vqa"]
