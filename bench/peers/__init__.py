# SPDX-License-Identifier: Apache-2.0
"""What else computes the same, in the same run: PyTorch's own kernels, and everybody else's.

A module per family, its adapters in a table.  Each imports its library where it is called, so that
what is not installed costs nothing; `libraries` says what is here.
"""

from reeltime.bench.peers import norm as norm
from reeltime.bench.peers import quant as quant
from reeltime.bench.peers import rope_kv as rope_kv
from reeltime.bench.peers import sla as sla
from reeltime.bench.peers.adapter import beside as beside
from reeltime.bench.peers.attention import scaled_dot_product as scaled_dot_product
from reeltime.bench.peers.copies import copying as copying
from reeltime.bench.peers.gemm_w8a8 import products as products
