"""Which mesh to train on: what a placement costs, and the search for the best.

Everything here is computed from abstract shapes; no device is touched and nothing is
compiled.
"""
