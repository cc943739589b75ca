"""Compare a short run, or a file of results, with the newest stored results: did a ratio to the baseline get worse?

    make bench-check
    python -m benchmarks.check --result new.json
    python -m benchmarks.check --backbones resnet50 --work eval1

Ratios, not times, so that machines and days compare to some degree. A ratio counts as worse if it fell by more than
the tolerance and by more than both runs' scatter: the new upper quartile lies below the stored lower one. The exit
status is 1 if one did.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import timing

TOLERANCE = 0.15
"""Share of the stored ratio that a new one may lack: runs on one machine differ by up to about a tenth."""
QUICK = ("--backbones", "resnet50", "--work", "train2,eval1,eval5", "--repeats", "3", "--memory", "none")
"""A run of about two minutes."""

Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Comparison:
    """One variant's ratio, stored and new, with their quartiles."""

    key: Key
    variant: str
    stored: dict[str, float]
    new: dict[str, float]

    @property
    def change(self) -> float:
        """-0.2: a fifth of the ratio is gone."""
        return self.new["of_medians"] / self.stored["of_medians"] - 1

    def worse(self, tolerance: float = TOLERANCE) -> bool:
        return self.change < -tolerance and self.new["q3"] < self.stored["q1"]

    def line(self, tolerance: float) -> str:
        device, backbone, work, size = self.key
        name = f"{backbone} {work} {size} px {device} {self.variant}"
        verdict = "WORSE" if self.worse(tolerance) else ""
        ratios = [f"{one['of_medians']:6.2f} ({one['q1']:.2f}-{one['q3']:.2f})" for one in (self.stored, self.new)]
        return f"{name:<44} {ratios[0]:>22} {ratios[1]:>22} {self.change:+7.0%} {verdict}".rstrip()


def compare(stored: dict[Key, dict[str, Any]], new: dict[Key, dict[str, Any]]) -> list[Comparison]:
    """Every variant that both have, but the baseline."""
    return [
        Comparison(key, name, stored[key]["variants"][name]["ratio"], entry["ratio"])
        for key, measured in sorted(new.items())
        if key in stored
        for name, entry in measured["variants"].items()
        if name in stored[key]["variants"] and not name.startswith("baseline")
    ]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 if something got worse, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result", type=Path, help="file of new results; a short run is made if left out")
    parser.add_argument("--stored", type=Path, default=timing.RESULTS, help="folder of stored results")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share of a ratio that may be lost")
    options, rest = parser.parse_known_args(arguments)
    stored = timing.newest(sorted(options.stored.glob("*.json")))
    if not stored:
        print(f"No results in {options.stored}: run `make bench` first.", file=sys.stderr)
        return 2
    if options.result:
        new = timing.newest([options.result])
    else:
        from benchmarks import run

        with tempfile.TemporaryDirectory() as folder:
            new = timing.newest([run.main([*QUICK, *rest, "--out", str(Path(folder, "new.json"))])])
    compared = compare(stored, new)
    if not compared:
        print("The stored results have none of this work: nothing was compared.", file=sys.stderr)
        return 2
    print(f"\n{'times faster than the published way':<44} {'stored':>22} {'new':>22}  change")
    for one in compared:
        print(one.line(options.tolerance))
    worse = [one for one in compared if one.worse(options.tolerance)]
    print(f"{len(worse)} of {len(compared)} ratios got worse by more than {options.tolerance:.0%} and their scatter.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
