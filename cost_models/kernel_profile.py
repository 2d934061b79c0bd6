"""Kernel profile: the kernels of one GPU and framework, fitted to measured tables, as the JSON file that ships."""

import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cost_models.boosting import Trees
from cost_models.intervals import Spread
from cost_models.kernel_fit import Fit
from cost_models.physics import Physics
from traces.errors import InputError
from traces.files import read_document, write_text

FORMAT: Literal["moeroute kernel profile"] = "moeroute kernel profile"
FORMAT_VERSION: Literal[1] = 1
FRAMEWORKS = ("trtllm", "sglang", "vllm", "nccl")  # as their profiles are called
SHIPPED = Path(__file__).parent / "profiles"

Positive = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeldOutError(_Strict):
    """Absolute errors, as fractions of the measured time, over rows that the fit did not see.

    `holdout` names what was held out, in `folds` folds. `roofline_mape`, `physics_mape` and their medians are those of
    the datasheet's bound and of the physical model alone. `coverage90`: the share of rows inside their 90% interval.
    `sound_mape` and `sound_median_ape` leave out the `suspects`, rows that a rule finds to be wrong.
    """

    holdout: str
    rows: int
    folds: int
    mape: float
    median_ape: float
    p90_ape: float
    coverage90: float
    mape_le8_tokens: float | None
    median_ape_le8_tokens: float | None
    physics_mape_le8_tokens: float | None
    suspects: int
    sound_mape: float
    sound_median_ape: float
    physics_mape: float
    physics_median_ape: float
    roofline_mape: float
    roofline_median_ape: float


class Series(_Strict):
    """One shape at rising sizes: measured, fitted by all rows, and predicted while its fold was held out; microseconds.

    Like all that is only plotted: small numbers keep files short.
    """

    label: str
    sizes: list[int]
    measured_us: list[Positive]
    fitted_us: list[Positive]
    held_out_us: list[Positive | None]


class Sample(_Strict):
    """Some of what was measured, for plots: whole series along `size`, and held-out pairs from all over the table."""

    size: str
    series: list[Series]
    predicted_us: list[Positive]
    measured_us: list[Positive]


class FittedKernel(_Strict):
    """One operation in one dtype, as a framework runs it: prices, region, trees and intervals.

    `table`: the measurements it was fitted to; `kind`: the kind of table, which says how operations are described.
    """

    table: str
    kind: str
    framework: str
    version: str
    op: str
    dtype: str
    rows: int
    prices: dict[str, dict[str, float]]
    overlap: dict[str, float]
    features: list[str]
    sources: list[str]
    low: list[float]
    high: list[float]
    trees: str
    interval_edges_s: list[float]
    interval_low: list[Annotated[float, Field(gt=0, le=1)]]
    interval_high: list[Annotated[float, Field(ge=1)]]
    errors: list[HeldOutError] = Field(min_length=1)
    sample: Sample

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        width = len(self.features) + len(self.sources) - 1
        if not len(self.low) == len(self.high) == width:
            raise ValueError(f"{width} features but a region of {len(self.low)}")
        if not len(self.interval_low) == len(self.interval_high) == len(self.interval_edges_s) + 1:
            raise ValueError("interval bins do not match their edges")
        return self

    @cached_property
    def fit(self) -> Fit:
        """The fit, ready to predict; unpacked when first asked for."""
        return Fit(
            physics=Physics(prices=self.prices, overlap=self.overlap),
            features=tuple(self.features),
            sources=tuple(self.sources),
            low_F=np.array(self.low),
            high_F=np.array(self.high),
            trees=Trees.unpacked(self.trees),
        )

    @cached_property
    def spread(self) -> Spread:
        """Its intervals."""
        return Spread(
            edges_s=tuple(self.interval_edges_s), low=tuple(self.interval_low), high=tuple(self.interval_high)
        )


class KernelProfile(_Strict):
    """The fitted kernels of one GPU under one framework."""

    format: Literal["moeroute kernel profile"] = FORMAT
    format_version: Literal[1] = FORMAT_VERSION
    gpu: str
    framework: str
    source: str
    kernels: list[FittedKernel] = Field(min_length=1)

    @property
    def file_name(self) -> str:
        """What its file is called."""
        return f"{self.gpu}_{self.framework}.json"

    def write(self, path: Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        write_text(path, json.dumps(self.model_dump(), separators=(",", ":"), allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a profile; `InputError` says what is wrong with the file."""
        return cls.parse(read_document(path), path)

    @classmethod
    def parse(cls, document: Any, path: Path) -> Self:
        """Check a profile that was read from `path`."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise InputError(
                f"{path}: {field}: {first['msg'].lower()}; fit it again with moeroute calibrate"
            ) from error


def is_kernel_profile(document: Any) -> bool:
    """Whether a document is a profile of kernels, not one of this machine's operations."""
    return isinstance(document, dict) and document.get("format") == FORMAT


def shipped_profile(gpu: str, framework: str) -> Path:
    """The file of the kernels of `framework` on `gpu` that comes with moeroute; `InputError` names those that do."""
    profiles = shipped_profiles(gpu)
    if framework not in profiles:
        raise InputError(f"no {framework} kernels of {gpu} come with moeroute; known are {', '.join(profiles)}")
    return profiles[framework]


def shipped_profiles(gpu: str) -> dict[str, Path]:
    """The profiles of `gpu` that come with moeroute, by framework; `InputError` names the GPUs that have some."""
    by_gpu: dict[str, dict[str, Path]] = {}
    for path in sorted(SHIPPED.glob("*.json")):
        name, _, framework = path.stem.rpartition("_")
        by_gpu.setdefault(name, {})[framework] = path
    if gpu not in by_gpu:
        raise InputError(
            f"no measured kernels of {gpu!r} come with moeroute; known are {', '.join(by_gpu)}; "
            "moeroute calibrate --gpu fits others"
        )
    return by_gpu[gpu]
