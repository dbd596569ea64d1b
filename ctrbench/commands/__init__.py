# SPDX-License-Identifier: Apache-2.0
"""Commands of `ctrbench`, a module each: `add(commands)` declares the arguments, and imports nothing heavy before it runs."""
