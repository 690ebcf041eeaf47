"""Trace or read models, so that a layer does the activation after it."""
