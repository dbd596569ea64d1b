/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The elementwise part of a cross layer of DCNv3 and SDCNv3, forward and backward, each in one pass over the rows.
 *
 * With p = W x (made outside, as a matrix product), for each row of N = 2 M elements:
 *
 *     h = (p - mean) * scale + shift              batch normalisation of a head; left out where mean is NULL
 *     m = relu(weight * (h - E h) / sd(h) + bias) layer normalisation; m = relu(h) where weight is NULL
 *     y = (anchor * ([h, h m] + b) + x) * kept * factor
 *
 * All tensors are contiguous, in single precision; rows are (sample, head) pairs, head = row mod heads. `kept` holds a byte of
 * 0 or 1 for each element, or is NULL. Sums over the batch are taken in blocks of BLOCK rows and added up in the order of
 * the blocks, so that they do not depend on the number of threads.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "simd.h"

enum { BLOCK = 128 };

typedef struct {
    int64_t rows, half, heads, threads;
    float eps, factor;                 /* of the layer normalisation; 1 / (1 - p) of dropout */
    const float *mean, *scale, *shift; /* (heads) or NULL */
    const float *weight, *bias;        /* (half) or NULL */
    const float *b;                    /* (2 half) */
    const float *x, *anchor, *product; /* (rows, 2 half), (rows, 2 half), (rows, half) */
    const uint8_t *kept;               /* (rows, 2 half) or NULL */
} Layer;

typedef struct {
    float *dx, *danchor, *dproduct; /* as x, anchor (NULL where it is x) and product; dx lacks W's part */
    float *parameters;              /* of b, weight and bias, one after the other: (4 half) */
    double *by_head;                /* sums of dh and of dh * (p - mean): (heads, 2) */
} Gradients;

static int64_t num_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

static int64_t end_of(int64_t block, int64_t rows) {
    return (block + 1) * BLOCK < rows ? (block + 1) * BLOCK : rows;
}

/* h of a row, its mean and the reciprocal of its standard deviation. */
INLINED void normalise(const Layer *l, int64_t row, float *h, float *mu, float *rstd) {
    const float *p = l->product + row * l->half;
    const int64_t half = l->half, head = row % l->heads;
    const float mean = l->mean ? l->mean[head] : 0, scale = l->mean ? l->scale[head] : 1, shift = l->mean ? l->shift[head] : 0;
    float sum = 0, squares = 0;
    SUM(sum)
    for (int64_t j = 0; j < half; j++) {
        h[j] = (p[j] - mean) * scale + shift;
        sum += h[j];
    }
    if (!l->weight)
        return;
    sum /= half;
    SUM(squares)
    for (int64_t j = 0; j < half; j++)
        squares += (h[j] - sum) * (h[j] - sum);
    *mu = sum;
    *rstd = 1 / sqrtf(squares / half + l->eps);
}

FOR_EVERY_CPU static void forward_rows(const Layer *l, int64_t first, int64_t last, float *h, float *y) {
    const int64_t half = l->half;
    const float *b1 = l->b, *b2 = l->b + half, *weight = l->weight, *bias = l->bias;
    for (int64_t row = first; row < last; row++) {
        const float *x = l->x + row * 2 * half, *anchor = l->anchor + row * 2 * half;
        float *out = y + row * 2 * half, mu = 0, rstd = 1;
        normalise(l, row, h, &mu, &rstd);
        EACH
        for (int64_t j = 0; j < half; j++) {
            const float n = weight ? (h[j] - mu) * rstd * weight[j] + bias[j] : h[j];
            const float m = n > 0 ? n : 0;
            out[j] = anchor[j] * (h[j] + b1[j]) + x[j];
            out[half + j] = anchor[half + j] * (h[j] * m + b2[j]) + x[half + j];
        }
        if (l->kept) {
            const uint8_t *kept = l->kept + row * 2 * half;
            EACH
            for (int64_t j = 0; j < 2 * half; j++)
                out[j] *= kept[j] * l->factor;
        }
    }
}

/* `sums` gets what a block adds to `parameters` and, after them, to `by_head`. */
FOR_EVERY_CPU static void backward_rows(
    const Layer *l, int64_t first, int64_t last, float *scratch, const float *gradient, const Gradients *to, float *sums) {
    const int64_t half = l->half;
    const float *b1 = l->b, *b2 = l->b + half, *weight = l->weight, *bias = l->bias;
    float *h = scratch, *t = scratch + half, *g = scratch + 2 * half;
    float *db1 = sums, *db2 = sums + half, *dweight = sums + 2 * half, *dbias = sums + 3 * half, *by_head = sums + 4 * half;
    for (int64_t row = first; row < last; row++) {
        const float *anchor = l->anchor + row * 2 * half, *given = gradient + row * 2 * half;
        const float *p = l->product + row * half;
        float *dx = to->dx + row * 2 * half, *dh = to->dproduct + row * half, mu = 0, rstd = 1;
        float of_t = 0, of_tx = 0, of_dh = 0, of_centered = 0;
        normalise(l, row, h, &mu, &rstd);
        if (l->kept) {
            const uint8_t *kept = l->kept + row * 2 * half;
            EACH
            for (int64_t j = 0; j < 2 * half; j++)
                g[j] = given[j] * (kept[j] * l->factor);
        } else
            memcpy(g, given, 2 * half * sizeof *g);
        /* dx holds c until it is known below what it is for. */
        if (weight) {
            SUM(of_t, of_tx)
            for (int64_t j = 0; j < half; j++) {
                const float standard = (h[j] - mu) * rstd, n = standard * weight[j] + bias[j], m = n > 0 ? n : 0;
                const float dc1 = g[j] * anchor[j], dc2 = g[half + j] * anchor[half + j], dn = n > 0 ? dc2 * h[j] : 0;
                dx[j] = h[j] + b1[j];
                dx[half + j] = h[j] * m + b2[j];
                db1[j] += dc1;
                db2[j] += dc2;
                dweight[j] += dn * standard;
                dbias[j] += dn;
                dh[j] = dc1 + dc2 * m;
                t[j] = dn * weight[j];
                of_t += t[j];
                of_tx += t[j] * standard;
            }
            of_t /= half;
            of_tx /= half;
        } else {
            EACH
            for (int64_t j = 0; j < half; j++) {
                const float m = h[j] > 0 ? h[j] : 0;
                const float dc1 = g[j] * anchor[j], dc2 = g[half + j] * anchor[half + j];
                dx[j] = h[j] + b1[j];
                dx[half + j] = h[j] * m + b2[j];
                db1[j] += dc1;
                db2[j] += dc2;
                dh[j] = dc1 + dc2 * m;
                t[j] = dc2 * m; /* relu(h) h has the slope 2 m */
            }
        }
        const float mean = l->mean ? l->mean[row % l->heads] : 0;
        SUM(of_dh, of_centered)
        for (int64_t j = 0; j < half; j++) {
            dh[j] += rstd * (t[j] - of_t - (h[j] - mu) * rstd * of_tx);
            of_dh += dh[j];
            of_centered += dh[j] * (p[j] - mean);
        }
        by_head[2 * (row % l->heads)] += of_dh;
        by_head[2 * (row % l->heads) + 1] += of_centered;
        if (to->danchor) {
            float *danchor = to->danchor + row * 2 * half;
            EACH
            for (int64_t j = 0; j < 2 * half; j++) {
                danchor[j] = g[j] * dx[j];
                dx[j] = g[j];
            }
        } else {
            EACH
            for (int64_t j = 0; j < 2 * half; j++)
                dx[j] = g[j] * dx[j] + g[j];
        }
    }
}

/* Sums of p - near and of its square over rows, by head, one after the other; `near` is the first number of each head. */
FOR_EVERY_CPU static void moments_of_rows(
    const float *p, int64_t first, int64_t last, int64_t half, int64_t heads, float *sums) {
    for (int64_t row = first; row < last; row++) {
        const int64_t head = row % heads;
        const float near = p[head * half];
        float sum = 0, squares = 0;
        SUM(sum, squares)
        for (int64_t j = 0; j < half; j++) {
            const float offset = p[row * half + j] - near;
            sum += offset;
            squares += offset * offset;
        }
        sums[2 * head] += sum;
        sums[2 * head + 1] += squares;
    }
}

FOR_EVERY_CPU static void finish_rows(
    const Layer *l, int64_t first, int64_t last, const float *of_mean, const float *of_centered, float *dproduct) {
    for (int64_t row = first; row < last; row++) {
        const int64_t head = row % l->heads;
        const float a = of_mean[head], c = of_centered[head], mean = l->mean[head], scale = l->scale[head];
        const float *p = l->product + row * l->half;
        float *d = dproduct + row * l->half;
        EACH
        for (int64_t j = 0; j < l->half; j++)
            d[j] = scale * (d[j] - a - (p[j] - mean) * c);
    }
}

/* Add up `width` sums of each block, which follow each other in `sums`, in the order of the blocks. */
static void add_up(const float *sums, int64_t blocks, int64_t width, double *totals) {
    memset(totals, 0, width * sizeof *totals);
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t j = 0; j < width; j++)
            totals[j] += sums[block * width + j];
}

/*
 * What Python calls. All return 0, or -1 where memory is short.
 */

/* Mean and variance over the batch by head, (2, heads): of offsets from a number near the mean, so that no digits are lost. */
int cross_moments(const float *p, int64_t rows, int64_t half, int64_t heads, int64_t threads, double *moments) {
    const int64_t blocks = num_blocks(rows), width = 2 * heads, count = rows / heads * half;
    float *sums = calloc(blocks * width, sizeof *sums);
    double *totals = malloc(width * sizeof *totals);
    const int is_short = !sums || !totals;
    if (!is_short) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t block = 0; block < blocks; block++)
            moments_of_rows(p, block * BLOCK, end_of(block, rows), half, heads, sums + block * width);
        add_up(sums, blocks, width, totals);
        for (int64_t head = 0; head < heads; head++) {
            const double offset = totals[2 * head] / count;
            moments[head] = p[head * half] + offset;
            moments[heads + head] = fmax(totals[2 * head + 1] / count - offset * offset, 0);
        }
    }
    free(sums);
    free(totals);
    return is_short ? -1 : 0;
}

/* y of every row. */
int cross_forward(const Layer *l, float *y) {
    const int64_t blocks = num_blocks(l->rows);
    float *scratch = malloc(l->threads * l->half * sizeof *scratch);
    if (!scratch)
        return -1;
#pragma omp parallel for schedule(static) num_threads(l->threads)
    for (int64_t block = 0; block < blocks; block++)
        forward_rows(l, block * BLOCK, end_of(block, l->rows), scratch + omp_get_thread_num() * l->half, y);
    free(scratch);
    return 0;
}

/* All gradients but W's, from that of y. With batch normalisation `dproduct` is that of h until `cross_finish`. */
int cross_backward(const Layer *l, const float *gradient, const Gradients *to) {
    const int64_t blocks = num_blocks(l->rows), half = l->half, width = 4 * half + 2 * l->heads;
    float *scratch = malloc(l->threads * 4 * half * sizeof *scratch);
    float *sums = calloc(blocks * width, sizeof *sums);
    double *totals = malloc(width * sizeof *totals);
    const int is_short = !scratch || !sums || !totals;
    if (!is_short) {
#pragma omp parallel for schedule(static) num_threads(l->threads)
        for (int64_t block = 0; block < blocks; block++)
            backward_rows(
                l, block * BLOCK, end_of(block, l->rows), scratch + omp_get_thread_num() * 4 * half, gradient, to,
                sums + block * width);
        add_up(sums, blocks, width, totals);
        for (int64_t j = 0; j < 4 * half; j++)
            to->parameters[j] = totals[j];
        memcpy(to->by_head, totals + 4 * half, 2 * l->heads * sizeof *totals);
    }
    free(scratch);
    free(sums);
    free(totals);
    return is_short ? -1 : 0;
}

/* Take a batch normalisation's gradient from that of h to that of p: scale * (dh - of_mean - (p - mean) * of_centered). */
int cross_finish(const Layer *l, const float *of_mean, const float *of_centered, float *dproduct) {
    const int64_t blocks = num_blocks(l->rows);
#pragma omp parallel for schedule(static) num_threads(l->threads)
    for (int64_t block = 0; block < blocks; block++)
        finish_rows(l, block * BLOCK, end_of(block, l->rows), of_mean, of_centered, dproduct);
    return 0;
}
