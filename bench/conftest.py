# SPDX-License-Identifier: Apache-2.0
"""`pytest bench/bench_<family>.py`: one pytest-benchmark per case of the file."""

from __future__ import annotations

from typing import Any

from reeltime.bench.harness import here


def pytest_generate_tests(metafunc: Any) -> None:
    if "case" in metafunc.fixturenames:
        _, sizes = here()
        found = list(metafunc.module.cases(sizes))
        metafunc.parametrize("case", found, ids=[case.label for case in found])
