"""Data plane: shards in, prompts, engine, shards out."""

__version__ = "0.1.0"
