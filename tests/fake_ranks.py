"""One process that takes itself for a rank of many: layers are cut as in training, and what would be sent is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from brt_dist.parallel.process_groups import Axis, Processes


@contextmanager
def fake_tensor_ranks(ranks: int) -> Iterator[Processes]:
    """The first of so many tensor ranks; megatron-core and torch are left as they were found."""
    if ranks == 1:
        yield Processes(0, 0, torch.device("cpu"))
        return
    from megatron.core import parallel_state

    found = parallel_state._GLOBAL_MEMORY_BUFFER, torch.cuda.current_device
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield Processes(0, 0, torch.device("cpu"), tensor=Axis(0, tuple(range(ranks)), dist.group.WORLD))
    finally:
        dist.destroy_process_group()
        parallel_state._GLOBAL_MEMORY_BUFFER, torch.cuda.current_device = found
