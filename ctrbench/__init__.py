# SPDX-License-Identifier: Apache-2.0
"""ctrbench: config-first benchmarking of click-through-rate models."""

__version__ = "0.1.0"
