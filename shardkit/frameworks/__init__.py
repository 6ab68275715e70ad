"""Models of other libraries as the two functions that a `Trainer` asks for.

One module for each; none imports its library before it is used.
"""
