"""What all settings share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fewstep.config.kinds import EMBEDDED_BASE, Device, Precision, Seed, Text
from fewstep.config.spelling import one_line, refusal
from fewstep.errors import InputError


class Checked(BaseModel):
    """What all settings share: frozen, keyword-only, unknown names refused, errors of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        # Python counts True as 1: without this, ``max_steps = true`` would train for one step.
        for name, value in values.items():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise ValueError(refusal(name, value, cls))
        return values

    # Static checkers keep the signature that pydantic derives from the fields; at run time its errors become ours.
    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise InputError(one_line(error, type(self))) from None

    def replace(self, **changes: Any) -> Self:
        """The same settings with some of them changed, checked again."""
        return type(self)(**{**dict(self), **changes})


class Settings(Checked):
    """What all commands share."""

    device: Device = Field("auto", description="auto, cpu, cuda, cuda:N, mps or xpu; auto takes the fastest at hand.")
    mixed_precision: Precision = Field(
        "auto", description="Precision of the networks; auto is bf16 or fp16 on CUDA and no elsewhere."
    )
    seed: Seed = Field(42, description="All noise, data order and choices derive from it.")


class BaseModelSettings(Settings):
    """Which base model to work on."""

    base_model: Text | None = Field(
        None,
        description="Hub id, diffusers folder, single .safetensors/.ckpt file, or 'scenes', the base that comes with "
        "fewstep. Unset: the one recorded in the given adapter, else the default base.",
    )
    default_base: Text = Field(
        EMBEDDED_BASE, description="Base taken where neither --base_model nor the adapter names one."
    )
    revision: Text | None = Field(None, description="Branch, tag or commit of a base from the Hub.")
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None,
        description="What the network predicts. Unset: as the given adapter was trained on this base, else as the "
        "base's scheduler says.",
    )
    allow_pickle: bool = Field(
        False, description="Also open pickled weights (.ckpt, .bin), tensors only; otherwise only safetensors."
    )

    def chosen_base(self, recorded: str | None = None) -> tuple[str, str]:
        """The base model to open and why, as the first printed line names them.

        ``recorded`` is the base that the given adapter names, if it names one.
        """
        if self.base_model is not None:
            return self.base_model, "asked for with base_model"
        if recorded is not None:
            return recorded, "recorded in the adapter"
        return self.default_base, "the default base"


def forbid_both(settings: Checked, first: str, second: str, fix: str) -> None:
    """Refuse two settings of which only one can be meant; `fix` says which is which."""
    if getattr(settings, first) is not None and getattr(settings, second) is not None:
        raise ValueError(f"{first} and {second} came together; allowed is one of the two; {fix}")
