/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All of a cross layer of DCNv3 and SDCNv3 but its matrix products, forward and backward.
 *
 * With p = W x, for each row of N = 2 M elements:
 *
 *     h = gain * (p - mean) * rstd + shift        batch normalisation of a head; h = p where mean is NULL
 *     m = relu(weight * (h - E h) / sd(h) + bias) layer normalisation; m = relu(h) where weight is NULL
 *     y = (anchor * ([h, h m] + b) + x) * kept * factor
 *
 * That is one pass over the rows each way; with batch normalisation in training there is one more over p forward, for its
 * moments, and one more over its gradient backward, for what the moments have to do with it.
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

/* Of fewer elements than SMALL one thread takes all: to wake others costs more. */
enum { BLOCK = 128, SMALL = 1 << 14 };

typedef struct {
    int64_t rows, half, heads, threads;
    int64_t is_training;               /* batch normalisation by the batch's moments, which move the running ones */
    float eps, factor;                 /* of the layer normalisation; 1 / (1 - p) of dropout */
    float batch_eps, momentum;         /* of the batch normalisation */
    float *mean, *rstd;                /* (heads) each, which the forward pass sets and the backward pass reads; or NULL */
    const float *gain, *shift;         /* (heads) */
    float *running_mean, *running_var; /* (heads) */
    const float *weight, *bias;        /* (half) or NULL */
    const float *b;                    /* (2 half) */
    const float *x, *anchor, *product; /* (rows, 2 half), (rows, 2 half), (rows, half) */
    const uint8_t *kept;               /* (rows, 2 half) or NULL */
} Layer;

typedef struct {
    float *dx, *danchor, *dproduct; /* as x, anchor (NULL where it is x) and product; dx lacks W's part */
    float *parameters;              /* of b, weight, bias, gain and shift, one after the other: (4 half + 2 heads) */
} Gradients;

static int64_t num_blocks(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

static int64_t end_of(int64_t block, int64_t rows) {
    return (block + 1) * BLOCK < rows ? (block + 1) * BLOCK : rows;
}

/* h of a row, its mean and the reciprocal of its standard deviation. */
INLINED void normalise(const Layer *l, int64_t row, float *h, float *mu, float *rstd) {
    const float *p = l->product + row * l->half;
    const int64_t half = l->half, head = row % l->heads;
    const float mean = l->mean ? l->mean[head] : 0, scale = l->mean ? l->rstd[head] * l->gain[head] : 1;
    const float shift = l->mean ? l->shift[head] : 0;
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

/* `sums` gets what a block adds to the gradients of b, weight and bias and, by head, to the sums of dh and of dh * (p - mean). */
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
        const float a = of_mean[head], c = of_centered[head], mean = l->mean[head], scale = l->rstd[head] * l->gain[head];
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

/* Mean and variance of p over the batch by head: of offsets from a number near the mean, so that no digits are lost. */
static int take_moments(const Layer *l) {
    const int64_t blocks = num_blocks(l->rows), heads = l->heads, width = 2 * heads, count = l->rows / heads * l->half;
    float *sums = calloc(blocks * width, sizeof *sums);
    double *totals = malloc(width * sizeof *totals);
    const int is_short = !sums || !totals;
    if (!is_short) {
#pragma omp parallel for schedule(static) num_threads(l->threads) if (l->rows * l->half > SMALL)
        for (int64_t block = 0; block < blocks; block++)
            moments_of_rows(l->product, block * BLOCK, end_of(block, l->rows), l->half, heads, sums + block * width);
        add_up(sums, blocks, width, totals);
        for (int64_t head = 0; head < heads; head++) {
            const double offset = totals[2 * head] / count;
            const double variance = fmax(totals[2 * head + 1] / count - offset * offset, 0);
            l->mean[head] = l->product[head * l->half] + offset;
            l->rstd[head] = 1 / sqrt(variance + l->batch_eps);
            l->running_mean[head] += l->momentum * (l->mean[head] - l->running_mean[head]);
            l->running_var[head] += l->momentum * ((float)(variance * count / (count - 1)) - l->running_var[head]);
        }
    }
    free(sums);
    free(totals);
    return is_short ? -1 : 0;
}

/* From the gradient of h to that of p: gain * rstd * (dh - E dh - (p - mean) * rstd^2 E (dh * (p - mean))). */
static int finish(const Layer *l, const double *by_head, float *dproduct) {
    const int64_t blocks = num_blocks(l->rows), count = l->rows / l->heads * l->half;
    float *means = malloc(2 * l->heads * sizeof *means);
    if (!means)
        return -1;
    for (int64_t head = 0; head < l->heads; head++) {
        const double rstd = l->rstd[head];
        means[head] = by_head[2 * head] / count;
        means[l->heads + head] = by_head[2 * head + 1] * rstd * rstd / count;
    }
#pragma omp parallel for schedule(static) num_threads(l->threads) if (l->rows * l->half > SMALL)
    for (int64_t block = 0; block < blocks; block++)
        finish_rows(l, block * BLOCK, end_of(block, l->rows), means, means + l->heads, dproduct);
    free(means);
    return 0;
}

/*
 * What Python calls. Both return 0, or -1 where memory is short.
 */

/* y of every row; with batch normalisation also mean and rstd and, in training, the running moments. */
int cross_forward(const Layer *l, float *y) {
    const int64_t blocks = num_blocks(l->rows);
    float *scratch = malloc(l->threads * l->half * sizeof *scratch);
    if (!scratch)
        return -1;
    if (l->mean && l->is_training) {
        if (take_moments(l)) {
            free(scratch);
            return -1;
        }
    } else if (l->mean)
        for (int64_t head = 0; head < l->heads; head++) {
            l->mean[head] = l->running_mean[head];
            l->rstd[head] = 1 / sqrt((double)l->running_var[head] + l->batch_eps);
        }
#pragma omp parallel for schedule(static) num_threads(l->threads) if (l->rows * l->half > SMALL)
    for (int64_t block = 0; block < blocks; block++)
        forward_rows(l, block * BLOCK, end_of(block, l->rows), scratch + omp_get_thread_num() * l->half, y);
    free(scratch);
    return 0;
}

/* All gradients but W's and its part of dx, from that of y. */
int cross_backward(const Layer *l, const float *gradient, const Gradients *to) {
    const int64_t blocks = num_blocks(l->rows), half = l->half, heads = l->heads, width = 4 * half + 2 * heads;
    float *scratch = malloc(l->threads * 4 * half * sizeof *scratch);
    float *sums = calloc(blocks * width, sizeof *sums);
    double *totals = malloc(width * sizeof *totals);
    int is_short = !scratch || !sums || !totals;
    if (!is_short) {
#pragma omp parallel for schedule(static) num_threads(l->threads) if (l->rows * l->half > SMALL)
        for (int64_t block = 0; block < blocks; block++)
            backward_rows(
                l, block * BLOCK, end_of(block, l->rows), scratch + omp_get_thread_num() * 4 * half, gradient, to,
                sums + block * width);
        add_up(sums, blocks, width, totals);
        for (int64_t j = 0; j < 4 * half; j++)
            to->parameters[j] = totals[j];
        const double *by_head = totals + 4 * half;
        if (l->mean) {
            for (int64_t head = 0; head < heads; head++) {
                to->parameters[4 * half + head] = by_head[2 * head + 1] * l->rstd[head];
                to->parameters[4 * half + heads + head] = by_head[2 * head];
            }
            is_short = finish(l, by_head, to->dproduct);
        }
    }
    free(scratch);
    free(sums);
    free(totals);
    return is_short ? -1 : 0;
}
