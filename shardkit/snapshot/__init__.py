"""Snapshots: the state of a step in the memory of hosts, and what protects it.

Nothing here needs JAX; who holds a segment need not be who made it.
"""
