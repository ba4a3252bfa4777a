"""VISTA (arXiv 2505.10917): vision-text alignment as one loss term on any decoder-only vision-language model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Metric, Ramp, Reduction, VistaConfig
    from .loss import VistaLoss, vista_loss
    from .model import Patch, patch, vista_forward, vista_metrics
    from .train import Attachment, attach, vista_arguments, vista_setup

__version__ = "0.1.0"
_HOMES = {
    "config": ("Metric", "Ramp", "Reduction", "VistaConfig"),
    "loss": ("VistaLoss", "vista_loss"),
    "model": ("Patch", "patch", "vista_forward", "vista_metrics"),
    "train": ("Attachment", "attach", "vista_arguments", "vista_setup"),
}
__all__ = [
    "Attachment",
    "Metric",
    "Patch",
    "Ramp",
    "Reduction",
    "VistaConfig",
    "VistaLoss",
    "attach",
    "patch",
    "vista_arguments",
    "vista_forward",
    "vista_loss",
    "vista_metrics",
    "vista_setup",
]


def __getattr__(name: str) -> Any:
    """Imports on first use: `python -m vista_patch` reads source and needs no torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{home}", __name__), name)
    raise AttributeError(f"module 'vista_patch' has no attribute {name!r}")
