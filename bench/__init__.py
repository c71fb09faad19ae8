# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: they measure kernels and model through the public API and change neither."""
