# SPDX-License-Identifier: Apache-2.0
"""`reeltime check paths --backend cuda` without a GPU: the rows that docs/accuracy.md shows beside
the reference's.  Inputs are float32, which Hopper's own kernel leaves to that of sm_80.  Run in the
root of a checkout:

    python tests/cuda/check.py bench/results/accuracy_emulated.json
    reeltime check --update docs/accuracy.md --beside bench/results/accuracy_emulated.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from emulated import emulated

from reeltime.bench.accuracy import check

FAMILIES = ("rope_kv", "attention", "sla")
LEFT_OUT = "160k_keys"  # hours


def rows(kinds: Iterable[str]) -> Iterator[check.Row]:
    with emulated(*FAMILIES):
        for kind in kinds:
            found = check.check(check.PATHS, kind, backend="cuda")
            yield from (replace(row, device="sm_80 emulated") for row in found if check.ours(row))


def main(out: Path) -> None:
    found = rows(kind for kind in check.kinds(check.PATHS) if kind != LEFT_OUT)
    out.write_text(json.dumps({"rows": [row.document() for row in found]}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
