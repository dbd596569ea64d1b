# SPDX-License-Identifier: Apache-2.0
"""ctrbench: config-first benchmarking of click-through-rate models."""

from ctrbench import deferred

__version__ = "0.1.0"

# Before any module of this package imports a layer or a model of fuxictr.
deferred.prepare()
