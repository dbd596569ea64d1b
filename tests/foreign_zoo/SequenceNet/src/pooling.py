# SPDX-License-Identifier: Apache-2.0
def mask_of(X, field):
    return X[field].long() != 0  # padding_idx = 0 required
