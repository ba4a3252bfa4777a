"""VISTA in a LLaVA-style train.py: its flags, and its figures in the trainer's log."""

import functools
import inspect
import logging
import math
import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

from .config import FLAGS, VistaConfig
from .model import PARSED, _config, add, configured, find, vista_metrics, whose
from .observe import observe

logger = logging.getLogger(__name__)
# These releases of transformers divide no gradient by the number of micro-steps, but what they log.
SUMS = ("4.46.", "4.47.")


def vista_arguments(arguments: type) -> type:
    """Decorates a dataclass that HfArgumentParser reads: adds --vista and its settings, all off by default."""
    settings = {f.name: f for f in fields(VistaConfig)}
    added = []
    for flag, name in FLAGS.items():
        setting = settings[name]
        added.append((flag, setting.type, field(default=setting.default, metadata=setting.metadata)))

    def parsed(self: Any) -> None:
        getattr(super(extended, self), "__post_init__", lambda: None)()
        if self.vista != "off":
            PARSED.append(self.vista)

    extended = make_dataclass(arguments.__name__, added, bases=(arguments,), namespace={"__post_init__": parsed})
    extended.__module__ = arguments.__module__
    return extended


def vista_setup(trainer: Any, arguments: Any) -> None:
    """`attach` with the settings that a train script parsed (`vista_arguments` adds their flags).

    With VISTA off, what `trainer` does is stock's, but for this: a loss that is not finite stops the run at the log
    (give --logging_nan_inf_filter False: transformers otherwise shows it as 0).

    Call it between making a transformers.Trainer and `train()`. Raises ValueError on a setting out of range, TypeError
    where VISTA is on and the model has no place for its term.
    """
    PARSED.clear()
    config = VistaConfig.from_arguments(arguments)
    try:
        Attachment(trainer, config)
    except TypeError as error:
        raise TypeError(
            f"--vista {config.metric}: the forward of {type(trainer.model).__name__} does not add it; run "
            f"`python -m vista_patch check` on this LLaVA, or train with --vista off ({error})"
        ) from None


def attach(trainer: Any, metric: str = "l2", **settings: Any) -> "Attachment":
    """Makes `trainer`, a transformers.Trainer or a subclass, train its model with the VISTA term.

    Whoever computes the cross-entropy (the model, label smoothing, `compute_loss_func`, a fused kernel, the trainer
    itself), weight * term is added to what `trainer.compute_loss` returns in training. `trainer.log` gets loss_ce,
    loss_vista, vista_cosine and vista_share, `model.config.vista` the settings, also in an adapter's folder.

    The term of an optimizer step is the mean over its micro-steps of the mean over their samples with an image, however
    the trainer scales its own loss. So with equally many such samples a micro-step, only the batch as a whole counts.

    `settings` are VistaConfig's others: reduction, ramp, weight, detach_text. Call it between making the trainer and
    `train()`. Raises ValueError on a wrong setting, TypeError where the model has no place for the term.
    """
    return Attachment(trainer, configured(metric, settings))


class Attachment:
    """What `attach` has done to a trainer; `undo` takes it back."""

    def __init__(self, trainer: Any, config: VistaConfig):
        self.trainer, self.config, self.halved = trainer, config, 0.0
        self.sums = getattr(sys.modules.get("transformers"), "__version__", "").startswith(SUMS)
        self.model: Any = find(trainer.model) if config.active else trainer.model
        settings: Any = self.model.config
        self.before = vars(settings).get("vista")
        settings.vista = config.to_dict()
        self.stock: dict[str, Any] = {}
        for name in ("compute_loss", "log", "save_model") if config.active else ("log",):
            self.stock[name] = stock = getattr(trainer, name)
            setattr(trainer, name, functools.update_wrapper(functools.partial(getattr(self, name)), stock))
        steps = trainer.args.gradient_accumulation_steps if config.active else 1
        if steps > 1 and self.adds_up():
            logger.warning(
                "VISTA: this release of transformers takes the sum of the micro-steps' cross-entropy in place of "
                "the mean: with gradient_accumulation_steps = %d its gradient is %d times too large, with VISTA and "
                "without. The VISTA term is a mean. A newer release is right, and so are single micro-steps.",
                steps,
                steps,
            )

    def undo(self) -> None:
        for name in self.stock:
            vars(self.trainer).pop(name, None)
        self.model.config.vista = self.before
        if self.before is None:
            del self.model.config.vista

    def undivided(self, items: Any) -> bool:
        """Whether the gradient of an optimizer step is the sum over its micro-steps of what compute_loss returns.

        items: the num_items_in_batch of the step. Source: transformers.Trainer.training_step, 4.37 to 5.24.
        """
        trainer = self.trainer
        if getattr(trainer, "loss_is_scaled_for_ga", None) is not None:
            return bool(trainer.loss_is_scaled_for_ga)
        given = items is not None and getattr(trainer, "model_accepts_loss_kwargs", False)
        return self.sums or given or getattr(trainer, "compute_loss_func", None) is not None

    def adds_up(self) -> bool:
        """Whether the trainer's own loss is then a mean over a micro-step, so that more micro-steps make it larger."""
        trainer, smoother = self.trainer, getattr(self.trainer, "label_smoother", None)
        if getattr(trainer, "compute_loss_func", None) is not None or not self.undivided(1):
            return False
        if smoother is not None:
            return "num_items_in_batch" not in inspect.signature(smoother).parameters
        names = inspect.unwrap(self.model.forward).__code__.co_names
        return "CrossEntropyLoss" in names and "loss_function" not in names

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        stock = self.stock["compute_loss"]
        if not model.training or not _config(self.model).active:
            return stock(model, inputs, *args, **kwargs)
        with observe(self.model, self.config, inputs) as step:
            result = stock(model, inputs, *args, **kwargs)
        items = inspect.signature(stock).bind(model, inputs, *args, **kwargs).arguments.get("num_items_in_batch")
        share = 1.0
        if self.undivided(items):
            steps = self.trainer.args.gradient_accumulation_steps
            share = 1.0 / getattr(self.trainer, "current_gradient_accumulation_steps", steps)
        self.halved = share if self.sums and items is None and share < 1 else 0.0
        if isinstance(result, tuple):
            return (add(step, result[0], share, self.halved > 0), *result[1:])
        return add(step, result, share, self.halved > 0)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "loss" in logs:
            step = f"step {self.trainer.state.global_step}"
            figures = vista_metrics(self.trainer.model, where=step)
            if self.config.active and not figures:
                raise RuntimeError(
                    f"VISTA: no step before {step} went through {type(self.trainer).__name__}.compute_loss, which adds "
                    f"the term: {whose(self.model)} ran by another way"
                )
            logs = {**logs, **figures}
            if self.halved:  # what was logged of the term was divided once too often
                logs["loss"] += self.config.weight * figures["loss_vista"] * (1 - self.halved)
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(f"loss is {logs['loss']} at {step}: nothing was skipped or reset")
        return self.stock["log"](logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        result = self.stock["save_model"](output_dir, *args, **kwargs)
        folder = Path(output_dir or self.trainer.args.output_dir)
        if self.trainer.args.should_save and (folder / "adapter_config.json").exists():
            self.model.config.save_pretrained(folder)  # which an adapter's own save leaves out
        return result
