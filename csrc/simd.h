/* SPDX-License-Identifier: Apache-2.0 */
/* How loops say that they may be vectorised, and functions that they are compiled for several kinds of processors. */
#ifndef CTRBENCH_SIMD_H
#define CTRBENCH_SIMD_H

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define FOR_EVERY_CPU
#endif
#define INLINED static inline __attribute__((always_inline))

#define PRAGMA(x) _Pragma(#x)
#define EACH PRAGMA(omp simd)
#define SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__))

#endif
