/* SPDX-License-Identifier: Apache-2.0 */
/* Raised, here and in ctrbench/native.py, with every change of arguments or structures: an old build is then left alone. */
int native_interface(void) { return 3; }
