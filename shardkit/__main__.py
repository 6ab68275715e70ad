"""`python -m shardkit`, which is the `shardkit` command."""

from shardkit.command.main import run

__all__: list[str] = []

if __name__ == "__main__":
    run()
