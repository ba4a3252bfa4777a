"""Two "nodes" on one machine, through scripts/training/cluster/train.sbatch: Slurm alone is a stand-in."""

import json
import os
import random
import subprocess

import pytest

from tests.helpers import ROOT

# A task on each node at once, without the container; stage 2 is not what is tested here.
SRUN = """#!/usr/bin/env bash
[[ $* != *finetune* ]] || exit 0
while [[ $1 != bash ]]; do shift; done
SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!
"""


def history(out, running):
    """The trainer's log of a run."""
    output, _ = running.communicate()
    assert running.returncode == 0 and (out / "done").exists(), output
    state = json.loads((out / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def test_two_nodes_under_slurms_script_give_the_losses_of_one(kit, tmp_path):
    out = tmp_path / "results/seed0/small-pretrain"
    one = history(out, kit("pretrain", RANKS="2"))
    out.rename(tmp_path / "one")

    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    slurm |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(random.randrange(10000))}
    slurm |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command = ["bash", ROOT / "scripts/training/cluster/train.sbatch", "small"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    two = history(out, subprocess.Popen(command, env=os.environ | slurm, **pipes))
    assert (out / "train.node1.log").exists()
    assert len(one) == 6 and one == two  # the same two ranks, the same sums
    for row in two:  # the trainer gathers `loss` over the ranks; the terms must be gathered alike to add up to it
        assert row["loss"] == pytest.approx(row["loss_ce"] + row["loss_vista"], abs=2e-4)  # loss: 4 digits
