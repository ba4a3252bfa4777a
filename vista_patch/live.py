"""VISTA on a model that is in memory: no source is touched, and leaving the `with` block takes it off again."""

import inspect

import torch

from .config import VistaConfig
from .model import _SUMS, SPLICES, _splice_call, add_vista


def patch(model: torch.nn.Module, metric: str = "l2", **settings) -> "Patch":
    """Makes `model`, or the LLaVA inside of it (PEFT, DDP), add the VISTA term to its loss in training mode.

    `settings` are VistaConfig's others: reduction, ramp, weight, detach_text. Works on classes whose forward splices
    as LLaVA's does, and on transformers' LlavaForConditionalGeneration. The class's forward is wrapped; another
    instance of it runs as before, for want of a config.vista. What the log needs is in `vista_metrics(model)`.

    Raises ValueError on a setting that is none of the choices, TypeError where no module here is such a LLaVA.
    """
    return Patch(model, VistaConfig(metric, **settings))


class Patch:
    """What `patch` has done to the module `model` of class `owner` or below. `undo` may be called twice."""

    def __init__(self, model: torch.nn.Module, config: VistaConfig):
        self.model, self.owner = _find(model)
        if "forward" in vars(self.model):
            raise TypeError(f"VISTA: this {type(self.model).__name__} has a forward of its own: patch it before that")
        forward = self.owner.forward
        if not hasattr(forward, "adds_vista"):
            spliced = _calls_splice(forward)
            forward = self.owner.forward = add_vista(forward, *(_splice_call(forward) if spliced else ()))
            forward.patches = 0
        if hasattr(forward, "patches"):  # it is not in the source
            forward.patches += 1
        self.before = self.model.config.__dict__.get("vista")
        self.model.config.vista = config.to_dict()
        self.done = True

    def undo(self) -> None:
        """Gives back the class's own forward, once no other patch needs it, and the config as it was."""
        if not self.done:
            return
        self.done, forward = False, self.owner.forward
        if hasattr(forward, "patches"):
            forward.patches -= 1
            if forward.patches == 0:
                self.owner.forward = forward.__wrapped__
        del self.model.config.vista
        if self.before is not None:
            self.model.config.vista = self.before
        vars(self.model).pop(_SUMS, None)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def _calls_splice(forward) -> bool:
    return any(name.startswith(SPLICES) for name in inspect.unwrap(forward).__code__.co_names)


def _find(model: torch.nn.Module) -> tuple[torch.nn.Module, type]:
    """The outermost module that is a LLaVA, and the class of its whose forward splices."""
    for module in model.modules():
        for cls in type(module).__mro__:
            forward = vars(cls).get("forward")
            whole = cls.__name__ == "LlavaForConditionalGeneration" and cls.__module__.startswith("transformers.")
            if forward and (whole or hasattr(forward, "adds_vista") or _calls_splice(forward)):
                return module, cls
    raise TypeError(
        f"VISTA: no module of {type(model).__name__} has a forward that calls self.{SPLICES[0]}, and none is "
        "transformers' LlavaForConditionalGeneration: there is no known place for the term"
    )
