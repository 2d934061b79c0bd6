"""The profile file: it comes back as it was, and what is wrong with it is said in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cost_models.calibrated import Calibrated
from cost_models.ops import MemoryCopy, Operation, Permute
from cost_models.profile import Curve, FitError, LinearFit, Profile
from traces.errors import InputError

PROFILE = Profile(
    device="cpu",
    device_name="test box",
    ranks=2,
    linear={"Permute": LinearFit(shape={}, coefficients={"call": 1e-5, "sort": 1e-9, "byte": 1e-10}, largest={})},
    curves={"MemoryCopy": Curve(bytes=[10, 20], seconds=[1e-6, 2e-6])},
    errors={
        "Permute": FitError(mape=0.1, median_ape=0.05, cases=3, low=0.9, high=1.1),
        "MemoryCopy": FitError(mape=0.4, median_ape=0.3, cases=1, low=0.9, high=1.1),
    },
    probe_s=(1e-3, 1.25e-3),
    load_average=0.5,
)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        Profile.read(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def changed(tmp_path: Path, **changes: Any) -> Path:
    document = PROFILE.model_dump(mode="json") | changes
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))
    return path


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.json"
    PROFILE.write(path)
    assert Profile.read(path) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_its_error_is_the_mean_over_all_sizes() -> None:
    assert PROFILE.mape == pytest.approx((3 * 0.1 + 1 * 0.4) / 4)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none.json")
    assert message == f"no such profile; make one with moeroute calibrate -o {tmp_path}"


def test_a_truncated_file_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILE.write(path)
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert message.startswith("not a JSON file (")
        assert message.endswith("); run moeroute calibrate again")


def test_a_binary_file_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(b"\xff\xfe\x00garbage")
    assert refusal(path).startswith("not a JSON file (")


@pytest.mark.parametrize("document", ["[]", "null", "3", '{"device": "cpu"}'])
def test_another_document_has_no_version(tmp_path: Path, document: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(document)
    assert refusal(path) == "profile format None, this moeroute reads 3; calibrate again"


def test_another_version_is_refused(tmp_path: Path) -> None:
    message = refusal(changed(tmp_path, format_version=1))
    assert message == "profile format 1, this moeroute reads 3; calibrate again"


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    message = refusal(changed(tmp_path, colour="red"))
    assert message == "colour: extra inputs are not permitted; run moeroute calibrate again"


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert refusal(changed(tmp_path, probe_s=...)) == "probe_s: field required; run moeroute calibrate again"


def test_a_wrong_type_is_named_with_its_place(tmp_path: Path) -> None:
    message = refusal(changed(tmp_path, linear={"Permute": {"shape": {}, "coefficients": {"call": "slow"}}}))
    assert message.startswith("linear.Permute.coefficients.call: input should be a valid number")


COPY = MemoryCopy(bytes_X=np.array(15.0))
PERMUTE = Permute(pairs_X=np.array(4), rows_X=np.array(4), row_bytes=2)


@pytest.mark.parametrize(
    ("changes", "operation"),
    [
        ({"curves": {"MemoryCopy": {"bytes": [], "seconds": []}}}, COPY),
        ({"curves": {"MemoryCopy": {"bytes": [10, 20], "seconds": [1]}}}, COPY),
        ({"curves": {"MemoryCopy": {"bytes": [20, 10], "seconds": [2, 1]}}}, COPY),
        ({"curves": {"MemoryCopy": {"bytes": [-20, 10], "seconds": [2, 1]}}}, COPY),
        ({"linear": {"Permute": {"shape": {}, "coefficients": {"call": 1e-5}}}}, PERMUTE),
        ({"ranks": 0}, COPY),
    ],
    ids=["empty curve", "uneven curve", "falling sizes", "negative size", "missing coefficient", "no ranks"],
)
def test_a_profile_that_cannot_price_is_refused_when_it_is_read_or_used(
    tmp_path: Path, changes: dict[str, Any], operation: Operation
) -> None:
    """Numbers that make no sense end in one line too, never in a traceback or a wrong price."""
    path = changed(tmp_path, **changes)
    with pytest.raises(InputError):
        Calibrated(Profile.read(path)).seconds(operation)
