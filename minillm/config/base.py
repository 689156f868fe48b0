"""What every group of the configuration shares: strict, frozen, typed."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A group of keys. Unknown keys are errors, defaults are validated, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
