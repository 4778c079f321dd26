/* Merging one tile of a weight: shared by the kernels of every instruction set. */
#ifndef LORAFORMAT_MERGE_H
#define LORAFORMAT_MERGE_H

#include "nf4.h"

/* Mirrored by merge_tile.Tile. Rows of `weight`, `delta` and `out` follow each other without a gap. */
typedef struct {
    int64_t rows, columns;
    const void *weight;
    const float *delta; /* NULL: nothing is added but zero */
    const float *gain;  /* NULL: 1 */
    int64_t gain_row, gain_step; /* elements from a row, and from a column, to the next */
    void *out;
    int64_t measure; /* fill what follows: sums of w^2, d^2, e d and (e - d)^2 */
    double sums[4];
    int64_t changed, swallowed, clipped;
} merge_job;

typedef void (*merge_fn)(merge_job *job);
typedef struct {
    merge_fn merge[NF4_DTYPES][NF4_DTYPES]; /* by the dtypes of weight and out */
} merge_ops;

extern const merge_ops merge_ops_scalar;
#ifdef NF4_X86
extern const merge_ops merge_ops_avx2;
#endif

#endif
