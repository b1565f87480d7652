"""What the configurations of all backbones have."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


def from_known(cls: type, json: Mapping[str, Any]) -> Any:
    """A dataclass of those entries that are its fields; what a file lacks has its default."""
    known = {entry.name for entry in fields(cls)}
    settings = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.items()
        if name in known
    }
    return cls(**settings)


@dataclass(frozen=True)
class BackboneConfig:
    """What every backbone has. out_indices: of the stages whose maps are used; 0 is the stem."""

    model_type: ClassVar[str] = ""

    out_indices: tuple[int, ...] = (2, 3, 4)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "BackboneConfig":
        """The ``backbone_config`` of a ``config.json``."""
        return from_known(cls, json)

    def to_json(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **asdict(self)}
