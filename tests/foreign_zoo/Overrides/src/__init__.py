# SPDX-License-Identifier: Apache-2.0
from .Evaluation import OwnEvaluation
from .Loops import OwnEpoch, OwnFit
from .Training import OwnCompile, OwnDecisions, OwnWeights
