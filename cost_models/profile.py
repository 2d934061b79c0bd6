"""Profile: what a calibration found, as the JSON file that is kept."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from traces.errors import InputError
from traces.files import read_document, write_json

FORMAT_VERSION = 3


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearFit(_Strict):
    """Seconds by feature, for operations of one shape; `largest`: each feature's largest value that was measured."""

    shape: dict[str, float]
    coefficients: dict[str, float]
    largest: dict[str, float]


class Curve(_Strict):
    """Seconds at measured sizes, both ascending.

    `full_duplex` says how an all-to-all's size is counted: a link that sends while it receives is as busy as its
    busier direction; a host that copies both ways itself is as busy as the mean of the two.
    """

    bytes: list[Annotated[float, Field(ge=0)]] = Field(min_length=1)
    seconds: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    full_duplex: bool = True

    @model_validator(mode="after")
    def _knots_in_order(self) -> Self:
        if len(self.bytes) != len(self.seconds):
            raise ValueError(f"{len(self.bytes)} sizes but {len(self.seconds)} times")
        if sorted(set(self.bytes)) != self.bytes:
            raise ValueError("sizes do not rise")
        return self


class FitError(_Strict):
    """Absolute errors, as fractions of the measured time, over `cases` sizes that were not fitted.

    `low` and `high`: measured times of those sizes lie between these multiples of the predicted ones.
    """

    mape: float
    median_ape: float
    cases: int
    low: Annotated[float, Field(gt=0, le=1)]
    high: Annotated[float, Field(ge=1)]


class Point(_Strict):
    """One measurement beside what the profile says of it, for plots."""

    label: str
    measured_s: float
    predicted_s: float
    held_out: bool


class Profile(_Strict):
    """Fitted costs of one device, by operation, with their errors on held-out sizes.

    `probe_s` is what one fixed expert MLP took before and after the measurements: their ratio shows how far the
    machine drifted in between. `load_average` is the host's over the last minute at the end.
    """

    format_version: int = FORMAT_VERSION
    device: str
    device_name: str
    ranks: int = Field(ge=1)
    linear: dict[str, LinearFit]
    curves: dict[str, Curve]
    errors: dict[str, FitError]
    points: dict[str, list[Point]] = Field(default_factory=dict)
    probe_s: tuple[float, float] = Field(description="before, after")
    load_average: float

    @property
    def mape(self) -> float:
        """Mean absolute error over all held-out sizes of all operations, as a fraction."""
        cases = sum(error.cases for error in self.errors.values())
        return sum(error.mape * error.cases for error in self.errors.values()) / cases

    def write(self, path: Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        write_json(path, self.model_dump())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a profile; `InputError` says what is wrong with the file."""
        return cls.parse(read_document(path), path)

    @classmethod
    def parse(cls, document: Any, path: Path) -> Self:
        """Check a profile that was read from `path`."""
        version = document.get("format_version") if isinstance(document, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: profile format {version}, this moeroute reads {FORMAT_VERSION}; calibrate again")
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: {field}: {first['msg'].lower()}; run moeroute calibrate again") from error
