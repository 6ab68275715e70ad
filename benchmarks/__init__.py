"""Measurements beside rivals; each script prints its table and its machine."""
