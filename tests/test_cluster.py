"""Two "nodes" on one machine: train.sh on each, as scripts/cluster/train.sbatch starts it."""

import json
import socket

import pytest

from tests.test_training import kit, workshop  # noqa: F401 (fixtures)


def train(kit, out, *nodes):  # noqa: F811
    """One train.sh for each element of `nodes`, all at once: the trainer's log."""
    for _ in range(3):  # with two ranks on a CPU, deepspeed 0.14.5 sometimes starts from garbage or dies at its end
        running = [kit("pretrain", RANKS="2", **variables) for variables in nodes]
        outputs = [process.communicate()[0] for process in running]
        if [process.returncode for process in running] == [0] * len(nodes):
            break
    assert (out / "done").exists(), outputs
    state = json.loads((out / "trainer_state.json").read_text())
    return [row for row in state["log_history"] if "loss" in row]


def test_two_nodes_give_the_losses_of_one(kit, tmp_path):  # noqa: F811
    out = tmp_path / "results/seed0/small-pretrain"
    one = train(kit, out, {})
    out.rename(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    common = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    two = train(kit, out, common | {"NODE_RANK": "0"}, common | {"NODE_RANK": "1"})
    assert (out / "train.node1.log").exists()
    assert len(one) == 6 and one == two  # the same two ranks, the same sums
    for row in two:  # the trainer gathers `loss` over the ranks; the terms must be gathered alike to add up to it
        assert row["loss"] == pytest.approx(row["loss_ce"] + row["loss_vista"], abs=2e-4)  # loss: 4 digits
