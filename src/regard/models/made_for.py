"""Which model something was calibrated for: its heads and layers mean nothing in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn


@dataclass(frozen=True)
class MadeFor:
    """A model's name and shape; models of one shape are taken for the same.

    Attributes:
        name: for people; it is not compared.
        layers, heads, kv_heads: of the text decoder.
        head_dim: width of a head.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> MadeFor:
        """What a loaded transformers model is.

        Args:
            model: the model or its decoder.
            name: as it was loaded; of a file or folder only the last part is kept. Default the kind of
                model, such as ``llama``.
        """
        config: Any = model.config
        config = config.get_text_config()
        heads = int(config.num_attention_heads)
        if name is None:
            name = str(config.model_type)
        return cls(
            Path(name).name if Path(name).exists() else name,
            int(config.num_hidden_layers),
            heads,
            int(getattr(config, "num_key_value_heads", None) or heads),
            int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        )

    @classmethod
    def read(cls, record: Any, who: str) -> MadeFor | None:
        """The inverse of :meth:`record`; ``None`` for a file that says nothing.

        Args:
            record: what JSON gave.
            who: named in the message.

        Raises:
            ValueError: it is no such record.
        """
        if record is None:
            return None
        kinds = {"name": str, "layers": int, "heads": int, "kv_heads": int, "head_dim": int}
        fits = isinstance(record, Mapping) and record.keys() == kinds.keys()
        if not fits or not all(type(record[key]) is kind for key, kind in kinds.items()):
            raise ValueError(
                f"{who}: made_for must have {', '.join(kinds)} (a text, whole numbers), got {record!r}"
            )
        return cls(**record)

    def record(self) -> dict[str, str | int]:
        """As plain data for a file."""
        return asdict(self)

    def check(self, model: nn.Module, who: str) -> None:
        """Raise ``ValueError`` unless a model has this shape.

        Args:
            model: the model or its decoder.
            who: what was made, which the message names.
        """
        found = MadeFor.of(model)
        if self._shape() != found._shape():
            raise ValueError(
                f"{who} was calibrated for {self.name} ({self._told()}), but the model, {found.name}, "
                f"has {found._told()}; calibrate it for this model"
            )

    def _shape(self) -> tuple[int, int, int, int]:
        return self.layers, self.heads, self.kv_heads, self.head_dim

    def _told(self) -> str:
        return (
            f"{self.layers} layers, {self.heads} heads, {self.kv_heads} key heads, "
            f"width {self.head_dim}"
        )
