"""The settings of the VISTA term: one set of names, types and checks for flags, config.json and TOML."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

# A new metric needs two edits: its name here, and its distance in `vista_loss`. The flags, the checks and the error
# messages follow from these types.
Metric = Literal["off", "l2", "cosine"]
Reduction = Literal["mean", "sum"]
Ramp = Literal["t/m", "t", "one"]
CHOICES: dict[str, tuple[str, ...]] = {
    "metric": get_args(Metric),
    "reduction": get_args(Reduction),
    "ramp": get_args(Ramp),
}


@dataclass(frozen=True)
class VistaConfig:
    """`vista_loss` says what metric, reduction, ramp and detach_text mean; `weight` multiplies the term in the loss.

    Raises ValueError on a wrong value and names the right ones.
    """

    metric: Metric = field(default="off", metadata={"help": "distance of text embeddings to the last image token"})
    reduction: Reduction = field(
        default="mean", metadata={"help": "of the squared distance over d; sum: Eq. 10 to the letter"}
    )
    ramp: Ramp = field(default="t/m", metadata={"help": "f(t), the weight of the t-th of m text tokens"})
    weight: float = field(default=1.0, metadata={"help": "multiplies the term"})
    detach_text: bool = field(default=False, metadata={"help": "stop the term's gradient into the text embeddings"})

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"vista {key} is {getattr(self, key)!r}: choose from {', '.join(choices)}")
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not math.isfinite(self.weight) or self.weight < 0:
            raise ValueError(f"vista weight is {self.weight!r}: give a finite number, 0 or more")
        if not isinstance(self.detach_text, bool):
            raise ValueError(f"vista detach_text is {self.detach_text!r}: give true or false")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "model.config.vista") -> "VistaConfig":
        """Reads what `to_dict` gave. Raises ValueError, with `where` in it, on an unknown key or a wrong value."""
        if not isinstance(settings, Mapping):
            raise ValueError(f"{where} is {settings!r}: give a dict such as {{'metric': 'l2'}}")
        for key in settings:
            if key not in FLAGS.values():
                raise ValueError(f"{where} has an unknown key {key!r}: {nearest(key, FLAGS)}")
        return cls(**settings)

    @classmethod
    def from_arguments(cls, arguments: object) -> "VistaConfig":
        """Reads the settings by their flags' names, FLAGS: `vista` is the metric, `vista_weight` the weight, and so on.

        arguments: what a train script parsed (an object with these attributes, and others), or a mapping with these
        keys alone, such as a TOML table. What is missing keeps its default.
        Raises ValueError on a wrong value, and on a mapping's unknown key.
        """
        given = arguments if isinstance(arguments, Mapping) else vars(arguments)
        for key in given if given is arguments else ():
            if key not in FLAGS:
                raise ValueError(f"unknown key {key!r}: {nearest(key, {name: flag for flag, name in FLAGS.items()})}")
        return cls(**{name: given[flag] for flag, name in FLAGS.items() if flag in given})

    def to_arguments(self) -> dict[str, Any]:
        """The settings by their flags' names: what `from_arguments` reads."""
        return {flag: getattr(self, name) for flag, name in FLAGS.items()}

    def to_dict(self) -> dict[str, Any]:
        """The dict for `model.config.vista`, JSON-ready; off keeps no other key."""
        return asdict(self) if self.metric != "off" else {"metric": "off"}

    @property
    def active(self) -> bool:
        """Whether a training step changes: there is a metric, and its weight is not 0."""
        return self.metric != "off" and self.weight > 0


# Flag of a train script and key of a config's [vista] table: name of the setting.
FLAGS = {"vista" if f.name == "metric" else f"vista_{f.name}": f.name for f in fields(VistaConfig)}


def nearest(key: str, names: Mapping[str, str]) -> str:
    """What to write in place of the unknown `key`. `names`: what a user may have meant, and its right name."""
    near = difflib.get_close_matches(str(key).removeprefix("vista_"), [*names, *names.values()], n=1)
    return f"did you mean {names.get(near[0], near[0])}?" if near else f"the keys are {', '.join(names.values())}"
