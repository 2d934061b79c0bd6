"""Words for what policies say of themselves."""

from typing import Any

KINDS = {
    "selection": "selections: which candidates each token uses",
    "adjustment": "adjustments: move tokens once the whole step's choices are known",
    "capacity": "capacities: what an expert computes at most",
}


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line.

    >>> first_sentence("Each token uses one. More.")
    'Each token uses one.'
    """
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".") + "."


def range_in_words(parameter: dict[str, Any]) -> str:
    """What a search draws for a parameter, as in `describe_policies`.

    >>> range_in_words({"type": "float", "low": 0.01, "high": 10, "step": 0.01, "log": True})
    '0.01 to 10, log'
    >>> range_in_words({"type": "choice", "choices": ["none", "any"]})
    'none, any'
    """
    if parameter["type"] == "choice":
        return ", ".join(map(in_words, parameter["choices"]))
    return f"{parameter['low']:g} to {parameter['high']:g}{', log' if parameter['log'] else ''}"


def needs_in_words(policy: dict[str, Any]) -> str:
    """What a policy needs, and what single choices of its parameters need."""
    by_value = [
        f"{' and '.join(needs)} with {parameter['name']} {value}"
        for parameter in policy["parameters"]
        for value, needs in parameter.get("needs", {}).items()
        if needs
    ]
    return "; ".join([*policy["needs"], *by_value])


def in_words(value: Any) -> str:
    """A value as a scenario would write it; nothing for None."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
