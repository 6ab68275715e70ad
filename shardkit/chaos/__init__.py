"""Faults on purpose: which, where and when, and how each is done."""
