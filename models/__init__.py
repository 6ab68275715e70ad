"""Models to train with shardkit, written as a user would write them.

Each module has a factory that a config names (`models.gpt:build`) and that returns a
`shardkit.Model`. They use only what `shardkit` exports.
"""
