/* SPDX-License-Identifier: Apache-2.0 */
/* The sums that gradient clipping and an L2 penalty need, in one pass over the gradient and the weights. */
#include <stdint.h>
#include <stdlib.h>

#include "simd.h"

enum { BLOCK = 1 << 12 };

FOR_EVERY_CPU static void sums_of_block(const float *g, const float *w, int64_t count, double *sums) {
    float g_g = 0, g_w = 0, w_w = 0;
    if (w) {
        SUM(g_g, g_w, w_w)
        for (int64_t i = 0; i < count; i++) {
            g_g += g[i] * g[i];
            g_w += g[i] * w[i];
            w_w += w[i] * w[i];
        }
    } else {
        SUM(g_g)
        for (int64_t i = 0; i < count; i++)
            g_g += g[i] * g[i];
    }
    sums[0] = g_g;
    sums[1] = g_w;
    sums[2] = w_w;
}

/*
 * g.g, g.w and w.w of a gradient and its weights; the first alone where `w` is NULL. Blocks are added up in their order, whatever
 * the number of threads. Returns -1 where memory is short.
 */
int squared_norms(const float *g, const float *w, int64_t count, int64_t threads, double *sums) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
    double *of_blocks = malloc((3 * blocks + 1) * sizeof *of_blocks);
    if (!of_blocks)
        return -1;
#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * BLOCK, length = first + BLOCK < count ? BLOCK : count - first;
        sums_of_block(g + first, w ? w + first : NULL, length, of_blocks + 3 * block);
    }
    for (int64_t i = 0; i < 3; i++)
        sums[i] = 0;
    for (int64_t i = 0; i < 3 * blocks; i++)
        sums[i % 3] += of_blocks[i];
    free(of_blocks);
    return 0;
}
