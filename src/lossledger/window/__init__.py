"""A window: micro-batches whose gradient is that of one big batch."""

from lossledger.window.ranks import merged, padded
from lossledger.window.window import NO_GRADIENT, Window, check_replay, opened, propagate, running

__all__ = ["NO_GRADIENT", "Window", "check_replay", "merged", "opened", "padded", "propagate", "running"]
