"""One step of a replicated or sharded model against the reference. A script for torchrun.

python -m tests.families.sharded '{"how": "ddp" | "fsdp2" | "zero2" | "zero3", "family": ...}' OUT_FILE
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
    if not how.startswith("zero"):
        dist.init_process_group("gloo")
    rank, ranks = (0, 1) if how.startswith("zero") else (dist.get_rank(), dist.get_world_size())
    # With DDP one rank has text alone; what is sharded needs the same modules on each.
    images = [[(1, 2), (0, 0)], [(1, 2), (1, 0)]][how != "ddp"]
    dtype = torch.float32 if how.startswith("zero") else torch.float64
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
    elif how == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (ranks,))
        for module in model.modules():
            if type(module).__name__.endswith("DecoderLayer"):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**inputs).loss.backward()
        actual = {name: None if p.grad is None else p.grad.full_tensor() for name, p in model.named_parameters()}
    else:
        import deepspeed

        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        config = {"train_batch_size": 2, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        config |= {"zero_optimization": {"stage": int(how[-1])}}
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), config=config
        )
        engine.backward(engine(**inputs).loss)
        engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=how == "zero3"):
            actual = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    metrics = vista_patch.vista_metrics(model)
    assert metrics["loss_vista"] > 0, metrics
    actual = {name: g for name, g in actual.items() if name in want}
    scale = max(g.abs().max() for g in want.values())
    assert_same_gradients(
        actual, want, 1e-9 if dtype == torch.float64 else 1e-4, noise=0.0 if dtype == torch.float64 else 1e-6 * scale
    )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
