"""Find what can be merged or folded in a model, by tracing it or by reading its source text."""
