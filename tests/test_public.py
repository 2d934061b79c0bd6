import re
import subprocess
import sys
from pathlib import Path

import moeroute

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there_and_documented():
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "api.md").read_text().split("|---|---|")[1]))
    assert documented == set(moeroute.__all__)
    for name in moeroute.__all__:
        assert getattr(moeroute, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(moeroute, "nothing_of_the_kind")


def test_importing_moeroute_and_asking_for_help_loads_nothing_heavy():
    heavy = {"torch", "numba", "numpy", "networkx", "optuna", "pyarrow", "plotly", "scipy"}
    code = (
        "import sys\n"
        "from moeroute.__main__ import main\n"
        "sys.argv = ['moeroute', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"sys.exit(' '.join(sorted({heavy!r} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
