# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of every family share: launching, device functions, the interpreter.

Only a family's triton.py imports this room, and only once a call asks for that backend.
"""
