"""Scores as the official servers compute them: pure functions on strings and lists."""
