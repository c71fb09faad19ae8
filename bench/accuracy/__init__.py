# SPDX-License-Identifier: Apache-2.0
"""How far every op is from float64, on inputs that break kernels.

One file per family holds its equation, written once more from the definition in float64 and with
nothing of the reference in it, and the cases that are run against it.  What is checked is thus the
reference as well as any other backend.
"""
