"""Typed settings: the schema, loading with every problem reported at once, and values that follow from them."""
