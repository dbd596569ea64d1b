/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dropout masks, the same as those of `ctrbench.dropout`, which says how they are drawn: a byte for each element, and 64 bits
 * more for the one in 256 that lies on the edge. Every block of BLOCK elements has generators of its own.
 */
#include <stdint.h>
#include <string.h>

#include "simd.h"

enum { BLOCK = 1 << 16, WORDS = 512, SKIPPED = 12 };

/* SFC64 by Chris Doty-Humphrey, as in NumPy. */
typedef struct {
    uint64_t a, b, c, counter;
} Sfc64;

INLINED uint64_t next(Sfc64 *g) {
    const uint64_t drawn = g->a + g->b + g->counter++;
    g->a = g->b ^ (g->b >> 11);
    g->b = g->c + (g->c << 3);
    g->c = ((g->c << 24) | (g->c >> 40)) + drawn;
    return drawn;
}

/* SplitMix64 by Sebastiano Vigna. */
static uint64_t split_mix(uint64_t *state) {
    uint64_t z = (*state += 0x9E3779B97F4A7C15u);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static Sfc64 generator(uint64_t *state) {
    Sfc64 g;
    g.a = split_mix(state);
    g.b = split_mix(state);
    g.c = split_mix(state);
    g.counter = 1;
    for (int i = 0; i < SKIPPED; i++)
        next(&g);
    return g;
}

FOR_EVERY_CPU static void draw_block(uint8_t *kept, int64_t count, uint64_t state, uint8_t edge, uint64_t above_edge) {
    Sfc64 bytes = generator(&state), ties = generator(&state);
    const uint64_t ones = 0x0101010101010101u;
    uint64_t words[WORDS];
    for (int64_t first = 0; first < count; first += sizeof words) {
        const int64_t size = count - first < (int64_t)sizeof words ? count - first : (int64_t)sizeof words;
        const int64_t num_words = (size + 7) / 8;
        const uint8_t *drawn = (const uint8_t *)words;
        for (int64_t i = 0; i < num_words; i++)
            words[i] = next(&bytes);
        EACH
        for (int64_t j = 0; j < size; j++)
            kept[first + j] = drawn[j] > edge;
        for (int64_t i = 0; i < num_words; i++) {
            const uint64_t differs = words[i] ^ (ones * edge);
            if (((differs - ones) & ~differs & (ones << 7)) == 0)
                continue; /* no byte of the word lies on the edge */
            for (int64_t j = 8 * i; j < 8 * i + 8 && j < size; j++)
                if (drawn[j] == edge)
                    kept[first + j] = next(&ties) >= above_edge;
        }
    }
}

/* Write 1 with probability 1 - p, else 0, where 256 p = edge + above_edge / 2^64. */
int draw_mask(uint8_t *kept, int64_t count, uint64_t seed, uint8_t edge, uint64_t above_edge, int64_t threads) {
    const int64_t blocks = (count + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * BLOCK, size = count - first < BLOCK ? count - first : BLOCK;
        draw_block(kept + first, size, seed + 0xD1342543DE82EF95u * (uint64_t)block, edge, above_edge);
    }
    return 0;
}
