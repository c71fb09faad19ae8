# SPDX-License-Identifier: Apache-2.0
"""reeltime port: what every kernel costs on every GPU, known before owning one.

`specimens` calls the public ops at the shapes of the DiT on meta tensors; `compile` turns what they
would launch into cubins and reads them; `report` judges, and shows it.
"""
