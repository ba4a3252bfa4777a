"""One step of a replicated or sharded model against the reference. A script for torchrun.

python -m tests.families.sharded '{"how": "ddp" | "fsdp2", "family": ...}' OUT_FILE
"""

import json
import sys

import torch
import torch.distributed as dist

import vista_patch
from tests.families.reference import assert_same_gradients, batch, build, gradients, term
from tests.families.registry import FAMILIES


def main(how: str, family: str) -> None:
    chosen = FAMILIES[family]
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # With DDP one rank has text alone; what is sharded needs the same modules on each.
    images = [[(1, 2), (0, 0)], [(1, 2), (1, 0)]][how != "ddp"]
    dtype = torch.float64
    model, want = build(chosen, dtype), {}
    for given in images[:ranks]:  # what each rank adds, and their mean
        output, expected = term(chosen, model, batch(chosen, model, images=given))
        (output.loss if expected is None else output.loss + 0.5 * expected).backward()
        for name, g in gradients(model).items():
            if g is not None:
                want[name] = want.get(name, 0) + g / ranks
    model = build(chosen, dtype)
    inputs = batch(chosen, model, images=images[rank])
    vista_patch.patch(model, weight=0.5)
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        wrapped(**inputs).loss.backward()
        actual = {name: p.grad for name, p in model.named_parameters()}
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (ranks,))
        for module in model.modules():
            if type(module).__name__.endswith("DecoderLayer"):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**inputs).loss.backward()
        actual = {name: None if p.grad is None else p.grad.full_tensor() for name, p in model.named_parameters()}
    metrics = vista_patch.vista_metrics(model)
    assert metrics["loss_vista"] > 0, metrics
    actual = {name: g for name, g in actual.items() if name in want}
    assert_same_gradients(actual, want)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
