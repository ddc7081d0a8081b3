"""Serving: a decode step, a prefill, memory and encoder–decoder models, against what people use."""
