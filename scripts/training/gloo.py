"""Runs stock.py as one of several ranks on CPUs, where deepspeed 0.14.5 would at times train from garbage.

Under ZeRO-3 it gathers all parameters of a module at once and waits for the last one alone. NCCL ends them in order.
Gloo does not: a late one overwrites weights that were loaded meanwhile with what its memory held before. The loss is
then NaN or, with no other sign, a little wrong. Here each parameter is gathered by itself.
deepspeed 0.19.8 mends it: https://github.com/deepspeedai/DeepSpeed/pull/8539
"""

import runpy
from typing import Any

from deepspeed.runtime.zero.partition_parameters import Init
from torch.nn import Parameter

gather = Init._allgather_params_coalesced


def gather_one_by_one(self: Init, param_list: list[Parameter], *args: Any, **kwargs: Any) -> None:
    for param in param_list:
        gather(self, [param], *args, **kwargs)


Init._allgather_params_coalesced = gather_one_by_one
runpy.run_path("scripts/training/stock.py", run_name="__main__")
