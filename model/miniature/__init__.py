# SPDX-License-Identifier: Apache-2.0
"""The miniature: a drawn avatar with exact ground truth, its training recipe, metrics, weights."""
