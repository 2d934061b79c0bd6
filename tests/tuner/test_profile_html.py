"""The pages of profiles: every kernel or operation, its errors, and nothing that runs what a file says."""

from pathlib import Path

import numpy as np

from cost_models.fit import fit_profile
from cost_models.kernel_profile import KernelProfile, shipped_profile
from cost_models.microbench.benchmark import Measurement
from cost_models.ops import Gate, MemoryCopy
from tuner.profile_html import write_kernel_profile_html, write_profile_html

HOSTILE = "<script>alert(1)</script>"


def test_a_page_shows_every_kernel_with_its_errors(tmp_path: Path) -> None:
    profile = KernelProfile.read(shipped_profile("h100_sxm", "vllm"))
    write_kernel_profile_html(tmp_path / "page.html", profile)
    page = (tmp_path / "page.html").read_text()
    assert "h100_sxm: kernels of vllm" in page
    for kernel in profile.kernels:
        assert f"{kernel.op}, {kernel.dtype} ({kernel.table})" in page
        assert f"{kernel.errors[0].median_ape:.1%}" in page
    assert page.count('id="plot-kernel-') == len(profile.kernels)


def test_names_from_a_file_are_text(tmp_path: Path) -> None:
    profile = KernelProfile.read(shipped_profile("h100_sxm", "vllm"))
    kernels = [
        kernel.model_copy(
            update={
                "table": HOSTILE,
                "version": HOSTILE,
                "sample": kernel.sample.model_copy(
                    update={
                        "size": HOSTILE,
                        "series": [s.model_copy(update={"label": HOSTILE}) for s in kernel.sample.series],
                    }
                ),
            }
        )
        for kernel in profile.kernels
    ]
    hostile = profile.model_copy(update={"source": HOSTILE, "kernels": kernels})
    write_kernel_profile_html(tmp_path / "page.html", hostile)
    page = (tmp_path / "page.html").read_text()
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_calibration_of_this_machine_has_a_page_too(tmp_path: Path) -> None:
    cases = [
        Measurement(
            operation=Gate(tokens_X=np.array(size), hidden=8, experts=4),
            seconds=size * 1e-6,
            repeats=1,
            held_out=size % 3 == 0,
        )
        for size in range(1, 10)
    ] + [
        Measurement(
            operation=MemoryCopy(bytes_X=np.array(size)), seconds=size * 1e-9, repeats=1, held_out=size % 2 == 0
        )
        for size in range(1, 10)
    ]
    profile = fit_profile(cases, device="cpu", device_name=HOSTILE, ranks=2, probe_s=(1.0, 1.0), load_average=0.1)
    write_profile_html(tmp_path / "page.html", profile)
    page = (tmp_path / "page.html").read_text()
    assert HOSTILE not in page
    assert page.count('id="plot-operation-') == 2
    assert "Gate" in page
