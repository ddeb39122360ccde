/* test_precision.c: attention of fp32 at the precisions "high" and "medium", against sums in double, on every tier that
 * has products of bf16. avx512bf16 computes "high" as fp32, since that is faster; here it is made to split numbers, so
 * that this code runs on CPUs without tile registers as well. Exits with 1 if there is a difference. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dhsa.h"
#include "kernels/kernels.h"

enum { H = 4, HKV = 2, L = 300, MAX_DIM = 80, E = 40 };

static float q[H * L * MAX_DIM], k[HKV * L * MAX_DIM], v[HKV * L * E], out[H * L * E], again[H * L * E];
static double want[H * L * E];
static int failures;

static float uniform(void) { return (float)rand() / (float)RAND_MAX * 4 - 2; }

static dhsa_tensor tensor(float *data, int64_t heads, int64_t dim)
{
    return (dhsa_tensor){
        .data = data, .dtype = DHSA_F32, .shape = {1, heads, L, dim}, .stride = {heads * L * dim, L * dim, dim, 1}};
}

static void attend(const dhsa_problem *p)
{
    dhsa_error error;
    if (dhsa_attend_dense(p, &error) == DHSA_OK) return;
    printf("%s\n", error.message);
    exit(1);
}

static void expect(const dhsa_problem *p, int64_t dim)
{
    static double s[L];
    for (int h = 0; h < H; h++)
        for (int i = 0; i < L; i++) {
            const int from = p->window ? (i + 1 > p->window ? i + 1 - (int)p->window : 0) : 0;
            double sum = 0, *row = want + (h * L + i) * E;
            memset(row, 0, E * sizeof *row);
            for (int j = from; j <= i; j++) {
                double x = 0;
                for (int d = 0; d < dim; d++)
                    x += (double)q[(h * L + i) * dim + d] * k[(h * HKV / H * L + j) * dim + d];
                x *= p->scale;
                s[j] = exp(p->softcap > 0 ? p->softcap * tanh(x / p->softcap) : x);
                sum += s[j];
            }
            for (int j = from; j <= i; j++)
                for (int e = 0; e < E; e++) row[e] += s[j] / sum * v[(h * HKV / H * L + j) * E + e];
        }
}

/* The largest error of rows that see no bad value; a row that sees one must have a NaN exactly in its column. */
static double largest_error(const dhsa_problem *p, int bad_key, int bad_column)
{
    double most = 0;
    for (int i = 0; i < H * L * E; i++) {
        const int at = i / E % L, sees = bad_key <= at && (!p->window || at - bad_key < p->window);
        if (sees && i % E == bad_column)
            failures += !isnan(out[i]);
        else
            most = fmax(most, isfinite(out[i]) ? fabs(out[i] - want[i]) : INFINITY);
    }
    return most;
}

static void check(const char *isa, dhsa_precision precision, int64_t dim, int64_t window, double softcap, double scale,
                  int poisoned)
{
    for (int64_t i = 0; i < H * L * dim; i++) q[i] = uniform();
    for (int64_t i = 0; i < HKV * L * dim; i++) k[i] = uniform();
    for (int i = 0; i < HKV * L * E; i++) v[i] = uniform();
    dhsa_problem p = {
        .q = tensor(q, H, dim), .k = tensor(k, HKV, dim), .v = tensor(v, HKV, E), .out = tensor(out, H, E)};
    p.scale = scale / sqrt((double)dim);
    p.softcap = softcap;
    p.window = window;
    p.causal = 1;
    p.num_threads = 2;
    p.precision = precision;
    expect(&p, dim);
    for (int h = 0; poisoned && h < HKV; h++) v[(h * L + 140) * E + 7] = NAN;
    attend(&p);
    const double error = largest_error(&p, poisoned ? 140 : L, 7);
    const double least = precision == DHSA_PRECISION_HIGH ? 2e-6 : 2e-3,
                 most = precision == DHSA_PRECISION_HIGH ? 1e-4 : 5e-2;
    memcpy(again, out, sizeof out);
    p.num_threads = 1;
    attend(&p);
    if (error >= least && error <= most && memcmp(again, out, sizeof out) == 0) return;
    failures++;
    printf("%s precision %d, dim %d, window %d, softcap %g, scale %g, poisoned %d: error %g, expected %g to %g\n", isa,
           (int)precision, (int)dim, (int)window, softcap, scale, poisoned, error, least, most);
}

int main(void)
{
    dhsa_error error;
    for (int i = 0; dhsa_isa_detected(i); i++) {
        const char *isa = dhsa_isa_detected(i);
        dhsa_kernels *table = (dhsa_kernels *)dhsa_kernels_find(isa); /* the tables of tiers are no constants */
        if (!table->bf16 || dhsa_isa_set(isa, &error) != DHSA_OK) continue;
        table->precisions |= 1 << DHSA_PRECISION_HIGH;
        for (int precision = DHSA_PRECISION_HIGH; precision <= DHSA_PRECISION_MEDIUM; precision++)
            for (int64_t dim = 16; dim <= MAX_DIM; dim += 21)
                for (int poisoned = 0; poisoned < 2; poisoned++) {
                    check(isa, (dhsa_precision)precision, dim, 0, 0, 1, poisoned);
                    check(isa, (dhsa_precision)precision, dim, 70, 0, -1, poisoned);
                    check(isa, (dhsa_precision)precision, dim, 0, 3, 1, poisoned);
                }
    }
    printf("%d differences\n", failures);
    return failures != 0;
}
