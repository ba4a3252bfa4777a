"""The settings of the VISTA term: `model.config.vista` as checked values."""

import difflib
import math
from dataclasses import asdict, dataclass, fields

CHOICES = {"metric": ("off", "l2", "cosine"), "reduction": ("mean", "sum"), "ramp": ("t/m", "t", "one")}


@dataclass(frozen=True)
class VistaConfig:
    """What the keys mean stands at `vista_patch.vista_loss`; `weight` multiplies the term in the training loss.

    Raises ValueError, naming the choices, on a value that is none of them.
    """

    metric: str = "off"
    reduction: str = "mean"
    ramp: str = "t/m"
    weight: float = 1.0
    detach_text: bool = False

    def __post_init__(self):
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"vista {key} is {getattr(self, key)!r}: choose from {', '.join(choices)}")
        if isinstance(self.weight, bool) or not isinstance(self.weight, (int, float)):
            raise ValueError(f"vista weight is {self.weight!r}: give a finite number, 0 or more")
        if not math.isfinite(self.weight) or self.weight < 0:
            raise ValueError(f"vista weight is {self.weight!r}: give a finite number, 0 or more")
        if not isinstance(self.detach_text, bool):
            raise ValueError(f"vista detach_text is {self.detach_text!r}: give true or false")

    @classmethod
    def from_dict(cls, settings: dict) -> "VistaConfig":
        """Reads `model.config.vista`. Raises ValueError on an unknown key, naming the nearest one."""
        if not isinstance(settings, dict):
            raise ValueError(f"model.config.vista is {settings!r}: give a dict such as {{'metric': 'l2'}}")
        keys = [field.name for field in fields(cls)]
        for key in settings:
            if key not in keys:
                near = difflib.get_close_matches(key, keys, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"
                raise ValueError(f"model.config.vista has an unknown key {key!r}: {hint}")
        return cls(**settings)

    def to_dict(self) -> dict:
        """The dict for `model.config.vista`, JSON-ready; off keeps no other key."""
        return asdict(self) if self.metric != "off" else {"metric": "off"}

    @property
    def active(self) -> bool:
        return self.metric != "off" and self.weight > 0
