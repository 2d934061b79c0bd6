"""`moeroute policies`, and the page that is made of the same."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeroute.cli.policies_page import REWRITE, policies_page
from moeroute.cli.policies_words import first_sentence, needs_in_words
from router.part import Need
from router.policies import ADJUSTMENTS, CAPACITIES, POLICIES, SELECTIONS, describe_policies

MOEROUTE = [sys.executable, "-m", "moeroute"]
PAGE = Path(__file__).parents[2] / "docs" / "policies.md"
# The policies of the literature that moeroute implements, by the name they have here.
PUBLISHED = {
    "1701.06538": "top_k",
    "2509.02753": "top_k_by_layer",
    "2403.07652": "top_p",
    "2512.13996": "held_top_p",
    "2402.14800": "skip_by_ratio",
    "2406.13233": "null_experts",
    "2410.07348": "null_experts",
    "2202.09368": "expert_choice",
    "2408.15664": "balance_bias",
    "2412.19437": "group_limited",
    "2504.01337": "partners",
    "2511.02237": "opportunistic",
    "2602.07265": "batch_set",
    "2412.00099": "cache_aware",
    "2302.09915": "topology_aware",
    "2503.05066": "capacity_aware",
    "2601.17111": "least_loaded_spill",
    "2006.16668": "capacity",
}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*MOEROUTE, "policies", *arguments], capture_output=True, text=True, check=False)


def test_json_has_every_policy_and_nothing_else() -> None:
    done = run("--json")
    assert (done.returncode, done.stderr) == (0, "")
    described = json.loads(done.stdout)
    assert [policy["name"] for policy in described] == list(POLICIES)
    assert {tuple(policy) for policy in described} == {("name", "kind", "source", "parameters", "needs", "description")}
    top_p = next(policy for policy in described if policy["name"] == "top_p")
    assert (top_p["kind"], top_p["source"], top_p["needs"]) == ("selection", "Huang et al., arXiv 2403.07652", [])
    p, k_max = top_p["parameters"]
    assert (p["name"], p["type"], p["low"], p["high"], p["default"]) == ("p", "float", 0.3, 0.95, None)
    assert (k_max["name"], k_max["type"], k_max["low"], k_max["high"]) == ("k_max", "int", 2, 8)


@pytest.mark.parametrize(("paper", "name"), sorted(PUBLISHED.items()))
def test_every_published_policy_is_there_under_its_paper(paper: str, name: str) -> None:
    assert paper in POLICIES[name].source


def test_every_policy_says_what_it_is() -> None:
    for policy in describe_policies():
        paragraphs = policy["description"].split("\n\n")
        assert len(paragraphs) > 1, policy["name"]
        assert policy["source"], policy["name"]
        assert set(policy["needs"]) <= set(Need.__args__), policy["name"]  # type: ignore[attr-defined]
        assert policy["parameters"], policy["name"]
        for parameter in policy["parameters"]:
            assert parameter["meaning"], f"{policy['name']}.{parameter['name']}"
            if parameter["type"] == "choice":
                assert parameter["default"] is None or parameter["default"] in parameter["choices"]
            else:
                assert parameter["low"] < parameter["high"], f"{policy['name']}.{parameter['name']}"


def test_needs_that_hang_on_a_parameter_are_said() -> None:
    capacity = next(policy for policy in describe_policies() if policy["name"] == "capacity")
    assert "more candidates than k with reroute any" in needs_in_words(capacity)


def test_the_tables_are_one_a_kind_and_fit_on_a_screen() -> None:
    done = run()
    assert done.returncode == 0
    for kind in (SELECTIONS, ADJUSTMENTS, CAPACITIES):
        for name in kind:
            assert re.search(rf"^{name} ", done.stdout, re.MULTILINE), name
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if line.rstrip().endswith("  needs")] == [
        "selections",
        "adjustments",
        "capacities",
    ]
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", list(POLICIES))
def test_one_in_full_fits_on_a_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from moeroute.cli.policies import print_policy

    described = next(policy for policy in describe_policies() if policy["name"] == name)
    print_policy(described)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name} ({described['kind']})\n\n{first_sentence(described['description'])[:40]}")
    assert all(parameter["name"] in printed for parameter in described["parameters"])
    assert printed.rstrip().endswith(f"source: {described['source']}")
    assert len(printed.splitlines()) < 60


def test_an_unknown_name_is_refused_in_one_line() -> None:
    done = run("top_q")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: unknown policy 'top_q'; known are balance_bias, ")


@pytest.mark.parametrize("arguments", [("--markdown", "--json"), ("--markdown", "top_k")], ids=" ".join)
def test_the_page_is_whole_or_not_at_all(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--markdown prints the whole page" in done.stderr


def test_the_page_is_what_the_policies_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == policies_page(describe_policies()), f"rewrite it: {REWRITE}"


def test_the_page_advises_policies_that_exist() -> None:
    advice = PAGE.read_text(encoding="utf-8").split("## Which one when")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", advice)) <= set(POLICIES)


def test_the_pages_scenario_can_be_read() -> None:
    import yaml

    from tuner.scenario import Config, Space

    shown = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    document: dict[str, Any] = yaml.safe_load(shown[1])
    assert Config.model_validate(document["config"]).routing_policy().width == 6
    assert Space.model_validate(document["study"]["space"]).policies == ["top_k", "top_p"]


def test_listing_policies_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from moeroute.__main__ import main\n"
        "sys.argv = ['moeroute', 'policies', '--json']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join(sorted({'torch', 'optuna', 'pyarrow', 'plotly', 'simpy'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
