"""Tiny random models of the real classes, and the probes of what works with what."""
