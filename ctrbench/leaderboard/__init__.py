# SPDX-License-Identifier: Apache-2.0
"""Run directories -> tables, statistics, evidence and the report page. Every figure is computed from report.json files."""
