"""What the processes of a training add up: one place for everything that is a sum over ranks."""

from lossledger.distributed.gradients import same_buffers, same_start, sum_gradients
from lossledger.distributed.group import ALONE, LONE_SHARE, Group, OneProcess, Share, cut
from lossledger.distributed.ranks import Ranks, joined, sharing_fate, together
from lossledger.distributed.shards import as_part, as_whole, divided_state, gathered, is_part
from lossledger.distributed.wrappers import (
    at_rest,
    clip_norm_,
    full,
    in_lockstep,
    is_sharded,
    local,
    place_gradients,
    summing,
    unwrapped,
)

__all__ = [
    "ALONE",
    "LONE_SHARE",
    "Group",
    "OneProcess",
    "Ranks",
    "Share",
    "as_part",
    "as_whole",
    "at_rest",
    "clip_norm_",
    "cut",
    "divided_state",
    "full",
    "gathered",
    "in_lockstep",
    "is_part",
    "is_sharded",
    "joined",
    "local",
    "place_gradients",
    "same_buffers",
    "same_start",
    "sharing_fate",
    "sum_gradients",
    "summing",
    "together",
    "unwrapped",
]
