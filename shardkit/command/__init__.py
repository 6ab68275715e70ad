"""The `shardkit` command: checkpoints looked at, checked, compared and converted.

Owns what a person or a script sees of `shardkit.checkpoint`. Nothing is decided here
that the library does not decide, and nothing loads JAX that does not need it.
"""
