# SPDX-License-Identifier: Apache-2.0
"""What is in a dataset, and what in it may leak: counted column by column, shown as a table and as a page."""
