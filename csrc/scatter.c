/* SPDX-License-Identifier: Apache-2.0 */
/* The gradient of an embedding table: what index_add_ does, by several threads and with the next rows on their way. */
#include <omp.h>
#include <stdint.h>

#include "simd.h"

enum { AHEAD = 16 };

FOR_EVERY_CPU static void add_own(
    float *table, const int64_t *rows, const float *values, const float *weights, int64_t count, int64_t length, int64_t width,
    int64_t own, int64_t threads) {
    for (int64_t i = 0; i < count; i++) {
        if (i + AHEAD < count && rows[i + AHEAD] % threads == own)
            __builtin_prefetch(table + rows[i + AHEAD] * width, 1);
        const float weight = weights ? weights[i] : 1;
        if (rows[i] % threads != own || weight == 0)
            continue;
        float *to = table + rows[i] * width;
        const float *value = values + i / length * width;
        EACH
        for (int64_t j = 0; j < width; j++)
            to[j] += weight * value[j];
    }
}

/*
 * table[rows[i]] += weights[i] * values[i / length] for i < count; weights are 1 where they are NULL. A thread adds to the rows
 * that are its own modulo the number of threads, in the order of i: the result does not depend on how many there are.
 */
int scatter_rows(
    float *table, const int64_t *rows, const float *values, const float *weights, int64_t count, int64_t length, int64_t width,
    int64_t threads) {
#pragma omp parallel num_threads(threads)
    add_own(table, rows, values, weights, count, length, width, omp_get_thread_num(), omp_get_num_threads());
    return 0;
}
