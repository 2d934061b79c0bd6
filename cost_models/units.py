"""Units: everything inside is SI (seconds, bytes, FLOP, bytes/s); these factors are for people and files.

Prefixes are decimal: a GB is 10^9 bytes, as vendors and networks count.
"""

US = 1e-6
MS = 1e-3
GB = 1e9
TB = 1e12
TFLOP = 1e12


def human_seconds(seconds: float) -> str:
    """A duration for people.

    >>> human_seconds(0.00123), human_seconds(4.2e-5), human_seconds(12.5)
    ('1.23 ms', '42 us', '12.5 s')
    """
    if seconds < MS:
        return f"{seconds / US:.3g} us"
    if seconds < 1:
        return f"{seconds / MS:.3g} ms"
    return f"{seconds:.4g} s"
