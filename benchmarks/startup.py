"""How long `moeroute --help` and `import moeroute` take, beside a bare interpreter, in turn.

python benchmarks/startup.py
"""

import os
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "bare interpreter": [sys.executable, "-c", ""],
    "import moeroute": [sys.executable, "-c", "import moeroute"],
    "moeroute --help": [sys.executable, "-m", "moeroute", "--help"],
}
ROUNDS = 15


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if round_:  # the first fills the file cache
                seconds[name].append(time.perf_counter() - start)
    print(f"{ROUNDS} rounds, load average {os.getloadavg()[0]:.1f}")
    for name, times in seconds.items():
        print(f"{name:18} median {statistics.median(times):.3f} s, {min(times):.3f} to {max(times):.3f}")


if __name__ == "__main__":
    main()
