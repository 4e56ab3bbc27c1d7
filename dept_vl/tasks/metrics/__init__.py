"""Scores as the official servers compute them: pure functions on strings and lists."""

__all__ = ["caption", "gqa", "nlvr2", "own", "text", "vqa"]
