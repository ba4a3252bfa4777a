"""VISTA in a LLaVA-style train.py: its flags, and its figures in the trainer's log."""

import math
from dataclasses import field, make_dataclass
from typing import Literal

from .config import CHOICES, VistaConfig
from .model import PARSED, vista_metrics


def vista_arguments(arguments: type) -> type:
    """Decorates a dataclass that HfArgumentParser reads: adds --vista and its settings, all off by default."""
    default = VistaConfig()
    flags = [
        ("vista", Literal[CHOICES["metric"]], default.metric, "distance of text embeddings to the last image token"),
        (
            "vista_reduction",
            Literal[CHOICES["reduction"]],
            default.reduction,
            "of the squared distance over d; sum: Eq. 10",
        ),
        ("vista_ramp", Literal[CHOICES["ramp"]], default.ramp, "f(t), the weight of the t-th of m text tokens"),
        ("vista_weight", float, default.weight, "multiplies the term"),
        ("vista_detach_text", bool, default.detach_text, "stop the term's gradient into the text embeddings"),
    ]
    added = [(name, kind, field(default=value, metadata={"help": text})) for name, kind, value, text in flags]

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
    config = VistaConfig(
        metric=arguments.vista,
        reduction=arguments.vista_reduction,
        ramp=arguments.vista_ramp,
        weight=arguments.vista_weight,
        detach_text=arguments.vista_detach_text,
    )
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
