# SPDX-License-Identifier: Apache-2.0
"""`python -m reeltime` is the command `reeltime`."""

from reeltime.cli import main

main()
