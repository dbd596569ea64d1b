# SPDX-License-Identifier: Apache-2.0
"""Raw public downloads -> the published splits, in bounded memory. What is special to a dataset is in data/prepare/<dataset>.py.

`description` says what a dataset is, `catalog` finds them, `download` fetches, `archives` opens, `lines` reads and checks
text, `folds` assigns rows to splits, `writing` writes them, `preparation` does all of it for one dataset.
"""
