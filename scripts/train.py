"""Runs an upstream's stock train.py in this process, with the four things that no flag of it can do.

1. Its projector is initialised before the trainer seeds anything: `--seed` is set here, so that two runs are equal.
2. Without CUDA, accelerate would still ask for NCCL under DeepSpeed: gloo is set up first, and found by it.
3. Without CUDA, `torch.cuda.synchronize()` at the final save must do nothing.
4. Newer torch loads nothing but weights by default: the classes in a checkpoint to continue from are named.

`--train_module` is the script as a module, such as llava.train.train_mem; all else goes to stock.
"""

import argparse
import os
import runpy
import sys

import deepspeed
import numpy as np
import torch
import transformers
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument("--train_module", required=True)
module, stock_argv = parser.parse_known_args()
parser.add_argument("--seed", type=int, required=True)
transformers.set_seed(parser.parse_known_args()[0].seed)
if not torch.cuda.is_available():
    if "LOCAL_RANK" in os.environ:  # under a launcher
        deepspeed.init_distributed("gloo", verbose=False)
    torch.cuda.synchronize = lambda device=None: None
if hasattr(torch.serialization, "add_safe_globals"):
    numpy_state = [np.core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype("uint32"))]
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, *numpy_state])
sys.argv[1:] = stock_argv
runpy.run_module(module.train_module, run_name="__main__", alter_sys=True)
if torch.distributed.is_initialized():
    # Ranks that leave one by one can tear gloo's threads down under each other: "terminate called", exit code -6.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
