"""VISTA in a LLaVA-style train.py: its flags, and its figures in the trainer's log."""

import math
from dataclasses import field, fields, make_dataclass

from .config import FLAGS, VistaConfig
from .model import PARSED, vista_metrics


def vista_arguments(arguments: type) -> type:
    """Decorates a dataclass that HfArgumentParser reads: adds --vista and its settings, all off by default."""
    settings = {f.name: f for f in fields(VistaConfig)}
    added = []
    for flag, name in FLAGS.items():
        setting = settings[name]
        added.append((flag, setting.type, field(default=setting.default, metadata=setting.metadata)))

    def parsed(self):
        getattr(super(extended, self), "__post_init__", lambda: None)()
        if self.vista != "off":
            PARSED.append(self.vista)

    extended = make_dataclass(arguments.__name__, added, bases=(arguments,), namespace={"__post_init__": parsed})
    extended.__module__ = arguments.__module__
    return extended


def vista_setup(trainer, arguments) -> None:
    """Writes the parsed flags to `trainer.model.config.vista` and adds `vista_metrics` to what `trainer` logs.

    A loss that is not finite stops the run at the log, with VISTA off too (give --logging_nan_inf_filter False:
    transformers otherwise shows it as 0).

    Call it between making a transformers.Trainer and `train()`. Raises ValueError on a setting out of range, TypeError
    where VISTA is on and no module of the model has a forward that adds it.
    """
    PARSED.clear()
    config = VistaConfig.from_arguments(arguments)
    classes = {cls for module in trainer.model.modules() for cls in type(module).__mro__}
    if config.active and not any(hasattr(vars(cls).get("forward"), "adds_vista") for cls in classes):
        raise TypeError(
            f"--vista {config.metric}: the forward of {type(trainer.model).__name__} does not add it; run "
            "`python -m vista_patch check` on this LLaVA, or train with --vista off"
        )
    trainer.model.config.vista = config.to_dict()
    stock_log = trainer.log

    def log(logs, *args, **kwargs):
        if "loss" in logs:
            step = f"step {trainer.state.global_step}"
            logs = {**logs, **vista_metrics(trainer.model, where=step)}
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(f"loss is {logs['loss']} at {step}: nothing was skipped or reset")
        return stock_log(logs, *args, **kwargs)

    trainer.log = log
