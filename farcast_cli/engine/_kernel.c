/* The engine's arithmetic, compiled: forecasts of a batch, and inner products of a trajectory.

   It gives the bytes of `arithmetic` and `casts`, which serve where it is not built: each operation rounds by itself, in the
   same order. So build it without fused multiply-add (-ffp-contract=off) and without -ffast-math. What is not finite it only
   reports; the caller computes that batch in numpy, which finds the snapshot and the tensor.

   It works on BLOCK values at a time, which stay in the nearest cache from the first operation to the last, and without the
   interpreter lock. It takes values from buffers, or reads them from files itself: of each as many at a time as a core keeps
   in its cache until they are computed. Buffers and values in files may begin at any byte. The loops are plain: the compiler makes vector code of them, with gcc on
   x86-64 Linux once for each generation of processors, from which the loader chooses.

   Shapes: S segments, T snapshots other than the origin, H horizons. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#define pread(fd, memory, size, offset) (errno = ENOSYS, -1) /* nobody gives it files there */
#else
#include <unistd.h>
#endif

#if FLT_EVAL_METHOD != 0 || (defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__)
#error "needs arithmetic that rounds each operation to its own type, and files' order of bytes: numpy does the work here"
#endif
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && defined(__GLIBC__)
#define PER_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define PART 256 /* products that are added up in float32: some thirty in each lane of a register of eight or sixteen */
#else
#define PER_PROCESSOR
#define PART 128
#endif
#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif

enum { F32, BF16, F16, F64 };
enum { BLOCK = 1024, SIDE = 2, LINE = 64, WINDOW_BYTES = 1 << 19 };
static const Py_ssize_t SIZE[] = {4, 2, 2, 8};
typedef const char *restrict Raw;

/* --- one number ------------------------------------------------------------------------------------------------------ */

INLINE uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
INLINE float of_bits(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
INLINE uint32_t is_no_number(uint32_t bits) { return (bits & 0x7F800000u) == 0x7F800000u; }
INLINE float from_bf16(uint16_t half) { return of_bits((uint32_t)half << 16); }

INLINE float from_f16(uint16_t half) {
    uint32_t exponent = half & 0x7C00u, bits = (uint32_t)(half & 0x7FFFu) << 13;
    bits += exponent == 0x7C00u ? 224u << 23 : exponent ? 112u << 23 : 113u << 23;
    bits = exponent ? bits : bits_of(of_bits(bits) - of_bits(113u << 23)); /* subnormal there, exact here */
    return of_bits(bits | (uint32_t)(half & 0x8000u) << 16);
}

INLINE uint16_t to_bf16(uint32_t bits) { return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16); }

INLINE uint16_t to_f16(uint32_t bits) { /* of a number: to nearest even, or infinity */
    uint32_t size = bits & 0x7FFFFFFFu, small = bits_of(of_bits(size) + 0.5f) - 0x3F000000u; /* .5 rounds at 2^-24 */
    uint32_t usual = (size - (112u << 23) + 0xFFFu + (size >> 13 & 1u)) >> 13;
    uint32_t half = size >= 0x47800000u ? 0x7C00u : size < 113u << 23 ? small : usual;
    return (uint16_t)(half | (bits >> 16 & 0x8000u));
}

/* --- a block of numbers ---------------------------------------------------------------------------------------------- */

#define EACH(type, raw) for (Py_ssize_t i = 0; i < n; i++) { type x; memcpy(&x, raw + i * (Py_ssize_t)sizeof x, sizeof x);

INLINE void widen_float(Raw raw, int type, float *restrict out, Py_ssize_t n) {
    if (type == F32) memcpy(out, raw, 4 * (size_t)n);
    else if (type == BF16) EACH(uint16_t, raw) out[i] = from_bf16(x); }
    else if (type == F16) EACH(uint16_t, raw) out[i] = from_f16(x); }
    else EACH(double, raw) out[i] = (float)x; }
}

INLINE void widen_double(Raw raw, int type, double *restrict out, Py_ssize_t n) {
    float single[BLOCK];
    if (type == F64) { memcpy(out, raw, 8 * (size_t)n); return; }
    widen_float(raw, type, single, n);
    for (Py_ssize_t i = 0; i < n; i++) out[i] = single[i];
}

/* Round to a stored type; whether a result is not finite. */
INLINE uint32_t narrow_float(const float *restrict values, int type, char *restrict out, Py_ssize_t n) {
    uint32_t bad = 0;
    if (type == F32) memcpy(out, values, 4 * (size_t)n);
    for (Py_ssize_t i = 0; i < n; i++) bad |= is_no_number(bits_of(values[i]));
    if (type == BF16) for (Py_ssize_t i = 0; i < n; i++) {
        uint16_t half = to_bf16(bits_of(values[i]));
        bad |= (half & 0x7F80u) == 0x7F80u;
        memcpy(out + 2 * i, &half, 2);
    }
    if (type == F16) for (Py_ssize_t i = 0; i < n; i++) {
        uint16_t half = to_f16(bits_of(values[i]));
        bad |= (half & 0x7C00u) == 0x7C00u;
        memcpy(out + 2 * i, &half, 2);
    }
    return bad;
}

INLINE uint32_t narrow_double(const double *restrict values, int type, char *restrict out, Py_ssize_t n) {
    float single[BLOCK];
    uint64_t bad = 0;
    if (type != F64) {
        for (Py_ssize_t i = 0; i < n; i++) single[i] = (float)values[i];
        return narrow_float(single, type, out, n);
    }
    memcpy(out, values, 8 * (size_t)n);
    EACH(uint64_t, out) bad |= (x & 0x7FF0000000000000u) == 0x7FF0000000000000u; }
    return (uint32_t)bad;
}

INLINE int64_t num_equal(Raw a, Raw b, Py_ssize_t size, Py_ssize_t n) {
    int64_t equal = 0;
    if (size == 2) EACH(uint16_t, a) uint16_t y; memcpy(&y, b + 2 * i, 2); equal += x == y; }
    else if (size == 4) EACH(uint32_t, a) uint32_t y; memcpy(&y, b + 4 * i, 4); equal += x == y; }
    else EACH(uint64_t, a) uint64_t y; memcpy(&y, b + 8 * i, 8); equal += x == y; }
    return equal;
}

/* --- a batch --------------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *origin, *const *others, *types, *moves, *bare; /* types: of the others, the origin, the output */
    char *const *outs;
    const double *weights, *gains; /* (S, H, T), and (S, H, 2) of gain and constant, or NULL */
    const int64_t *counts;
    Py_ssize_t num_segments, num_others, num_horizons;
    int non_negative;
    int64_t *unchanged;
} Batch;

/* w_hat = w_s + sum_t weights_t (w_t - w_s) + gain w_s + constant, in W; whether a result is not finite. `memory`: H blocks. */
#define COMBINE(W, NAME, WIDEN, NARROW)                                                                                    \
    PER_PROCESSOR static uint32_t NAME(const Batch *b, void *memory) {                                                     \
        W last[BLOCK], move[BLOCK];                                                                                        \
        char moved[BLOCK], own[8 * BLOCK];                                                                                 \
        const Py_ssize_t T = b->num_others, H = b->num_horizons;                                                           \
        const int from = b->types[T], to = b->types[T + 1];                                                                \
        uint32_t bad = 0;                                                                                                  \
        Py_ssize_t at = 0;                                                                                                 \
        for (Py_ssize_t s = 0; s < b->num_segments; s++) {                                                                 \
            const Py_ssize_t end = at + (Py_ssize_t)b->counts[s];                                                          \
            for (Py_ssize_t n; at < end; at += n) {                                                                        \
                n = end - at < BLOCK ? end - at : BLOCK;                                                                   \
                WIDEN(b->origin + at * SIZE[from], from, last, n);                                                         \
                if (!T) memset(memory, 0, (size_t)H * BLOCK * sizeof(W));                                                  \
                if (b->gains) memset(moved, 0, (size_t)n);                                                                 \
                for (Py_ssize_t t = 0; t < T; t++) {                                                                       \
                    WIDEN(b->others[t] + at * SIZE[(int)b->types[t]], b->types[t], move, n);                               \
                    if (!b->moves[t]) for (Py_ssize_t i = 0; i < n; i++) move[i] = move[i] - last[i];                      \
                    if (b->gains) for (Py_ssize_t i = 0; i < n; i++) moved[i] |= move[i] != 0;                             \
                    for (Py_ssize_t h = 0; h < H; h++) {                                                                   \
                        W *restrict update = (W *)memory + h * BLOCK;                                                      \
                        const W weight = (W)b->weights[(s * H + h) * T + t];                                               \
                        if (t) for (Py_ssize_t i = 0; i < n; i++) update[i] = update[i] + move[i] * weight;                \
                        else for (Py_ssize_t i = 0; i < n; i++) update[i] = move[i] * weight;                              \
                    }                                                                                                      \
                }                                                                                                          \
                const char *same = b->origin + at * SIZE[from];                                                            \
                if (from != to) NARROW(last, to, own, n), same = own;                                                      \
                for (Py_ssize_t h = 0; h < H; h++) {                                                                       \
                    W *restrict update = (W *)memory + h * BLOCK;                                                          \
                    char *out = b->outs[h] + at * SIZE[to];                                                                \
                    if (b->gains && T) {                                                                                   \
                        const W gain = (W)b->gains[2 * (s * H + h)], constant = (W)b->gains[2 * (s * H + h) + 1];          \
                        for (Py_ssize_t i = 0; i < n; i++)                                                                 \
                            update[i] = moved[i] ? update[i] + last[i] * gain + constant : 0;                              \
                    }                                                                                                      \
                    if (!b->bare[h]) for (Py_ssize_t i = 0; i < n; i++) { /* -0.0 + 0.0 would be 0.0 */                    \
                        const W sum = last[i] + update[i];                                                                 \
                        update[i] = update[i] == 0 ? last[i] : sum;                                                        \
                    }                                                                                                      \
                    if (b->non_negative) for (Py_ssize_t i = 0; i < n; i++)                                                \
                        update[i] = update[i] < 0 && update[i] > -(W)INFINITY ? 0 : update[i];                             \
                    bad |= NARROW(update, to, out, n);                                                                     \
                    b->unchanged[h] += num_equal(out, same, SIZE[to], n);                                                  \
                }                                                                                                          \
            }                                                                                                              \
        }                                                                                                                  \
        return bad;                                                                                                        \
    }

COMBINE(float, combine_float, widen_float, narrow_float)
COMBINE(double, combine_double, widen_double, narrow_double)

/* --- products -------------------------------------------------------------------------------------------------------- */

#ifdef __GNUC__
typedef float Partial; /* -fopenmp-simd makes it as many sums side by side as a register has lanes */
#else
typedef double Partial;
#endif

/* Add the products of SIDE rows a with SIDE rows b, n values of a block each, to `out`, whose rows are P long. */
INLINE void add_tile(const float *a, const float *b, Py_ssize_t n, double *out, Py_ssize_t P) {
    const float *restrict a0 = a, *restrict a1 = a + BLOCK, *restrict b0 = b, *restrict b1 = b + BLOCK;
    for (Py_ssize_t at = 0; at < n; at += PART) {
        const Py_ssize_t end = n - at < PART ? n : at + PART;
        Partial s00 = 0, s01 = 0, s10 = 0, s11 = 0;
#pragma omp simd reduction(+ : s00, s01, s10, s11)
        for (Py_ssize_t i = at; i < end; i++) {
            s00 += a0[i] * b0[i];
            s01 += a0[i] * b1[i];
            s10 += a1[i] * b0[i];
            s11 += a1[i] * b1[i];
        }
        out[0] += s00;
        out[1] += s01;
        out[P] += s10;
        out[P + 1] += s11;
    }
}

/* Add to products (P, P) those of the T rows w_0, d_1 .., and to `totals` (T) their sums: in float32 over a part of a block, and
   in double from there on. T counts all snapshots here, P is the next multiple of SIDE; tiles right of the diagonal are left out.
   `rows`: P + 1 blocks. `moved` (T): whether a row has a value other than 0. */
PER_PROCESSOR static void multiply(const char *const *raws, const char *types, Py_ssize_t T, Py_ssize_t count, double *products,
                                   double *totals, char *moved, float *rows) {
    const Py_ssize_t P = (T + SIDE - 1) / SIDE * SIDE;
    float *restrict before = rows + P * BLOCK;
    memset(rows, 0, (size_t)P * BLOCK * 4);
    for (Py_ssize_t at = 0, n; at < count; at += n) {
        n = count - at < BLOCK ? count - at : BLOCK;
        for (Py_ssize_t t = 0; t < T; t++) {
            float *restrict row = rows + t * BLOCK;
            Partial sum = 0;
            uint32_t any = 0;
            widen_float(raws[t] + at * SIZE[(int)types[t]], types[t], row, n);
            if (t == 0) memcpy(before, row, (size_t)n * 4);
            else for (Py_ssize_t i = 0; i < n; i++) {
                const float value = row[i];
                row[i] = value - before[i];
                before[i] = value;
            }
#pragma omp simd reduction(+ : sum) reduction(| : any)
            for (Py_ssize_t i = 0; i < n; i++) {
                sum += row[i];
                any |= row[i] != 0;
            }
            totals[t] += sum;
            moved[t] |= any != 0;
        }
        for (Py_ssize_t r = 0; r < T; r += SIDE) for (Py_ssize_t c = 0; c <= r; c += SIDE)
            add_tile(rows + r * BLOCK, rows + c * BLOCK, n, products + r * P + c, P);
    }
}

/* --- where values come from, and go to -------------------------------------------------------------------------------- */

typedef struct { int fd; long long offset; PyObject *path; } File;

/* Sources or outputs, number k of type types[k * step]: buffers, and files, of which a window is in memory at a time. */
typedef struct {
    Py_ssize_t count, step, value_bytes; /* value_bytes: of all files together */
    const char *types;
    Py_buffer *views; /* without an object where there is a file */
    File *files;
    char **pointers, *memory; /* pointers: to the window's values of each */
    Py_ssize_t failed;        /* number of the file that could not be read */
    int error;                /* 0 where it ends early */
    long long expected, found; /* its bytes */
} Held;

static void let_go(Held *held) {
    for (Py_ssize_t k = 0; k < held->count; k++) if (held->views[k].obj) PyBuffer_Release(held->views + k);
    free(held->views), free(held->files), free(held->pointers), free(held->memory);
}

/* Hold the members of a tuple, buffers of n values and (fd, offset, path) of files; 0 and an exception if they are none. */
static int hold(Held *held, PyObject *members, const char *types, Py_ssize_t step, Py_ssize_t n, int flags) {
    const size_t count = (size_t)PyTuple_Size(members);
    held->types = types, held->step = step;
    held->views = calloc(count + 1, sizeof *held->views);
    held->files = calloc(count + 1, sizeof *held->files);
    held->pointers = calloc(count + 1, sizeof *held->pointers);
    if (!held->views || !held->files || !held->pointers) return PyErr_NoMemory(), 0;
    for (; held->count < (Py_ssize_t)count; held->count++) {
        PyObject *member = PyTuple_GetItem(members, held->count);
        const int type = types[held->count * step];
        Py_buffer *view = held->views + held->count;
        File *file = held->files + held->count;
        int is_long_enough;
        if (PyTuple_Check(member) && flags == PyBUF_SIMPLE) {
            if (!PyArg_ParseTuple(member, "iLO", &file->fd, &file->offset, &file->path)) return 0;
            is_long_enough = n <= INT64_MAX / 8 && 0 <= file->offset && file->offset <= INT64_MAX - 8 * (int64_t)n;
        } else {
            if (PyObject_GetBuffer(member, view, flags)) return 0;
            is_long_enough = type >= F32 && type <= F64 && view->len / SIZE[type] >= n;
        }
        if (type < F32 || type > F64 || !is_long_enough) {
            if (view->obj) PyBuffer_Release(view);
            return PyErr_SetString(PyExc_ValueError, "a buffer is too short, or of an unknown type"), 0;
        }
        if (!view->obj) held->value_bytes += SIZE[type];
    }
    return 1;
}

/* How many of n values are in memory at a time, where each takes so many bytes in files: whole blocks, or all. */
static Py_ssize_t window_of(Py_ssize_t n, Py_ssize_t value_bytes) {
    const Py_ssize_t most = value_bytes ? WINDOW_BYTES / value_bytes / BLOCK * BLOCK : n;
    return most < BLOCK ? BLOCK : most < n ? most : n;
}

/* Make space for windows of n values of the files, each on a line of the cache; 0 and an exception if there is none. */
static int make_windows(Held *held, Py_ssize_t n) {
    if (!held->value_bytes) return 1;
    held->memory = malloc((size_t)(held->value_bytes * n + LINE * (held->count + 1)));
    if (!held->memory) return PyErr_NoMemory(), 0;
    char *next = held->memory + (LINE - (uintptr_t)held->memory % LINE) % LINE;
    for (Py_ssize_t k = 0; k < held->count; k++) if (!held->views[k].obj) {
        held->pointers[k] = next;
        next += (n * SIZE[(int)held->types[k * held->step]] + LINE - 1) / LINE * LINE;
    }
    return 1;
}

/* Have the pointers show values [at, at + n); whether the files could be read. Needs no interpreter lock. */
static int show(Held *held, Py_ssize_t at, Py_ssize_t n) {
    for (Py_ssize_t k = 0; k < held->count; k++) {
        const Py_ssize_t size = SIZE[(int)held->types[k * held->step]];
        if (held->views[k].obj) { held->pointers[k] = (char *)held->views[k].buf + at * size; continue; }
        const long long begin = held->files[k].offset + at * size;
        for (Py_ssize_t done = 0, count; done < n * size; done += count) {
            do count = pread(held->files[k].fd, held->pointers[k] + done, (size_t)(n * size - done), begin + done);
            while (count < 0 && errno == EINTR);
            if (count > 0) continue;
            held->failed = k, held->error = count ? errno : 0;
            held->expected = begin + n * size, held->found = begin + done;
            return 0;
        }
    }
    return 1;
}

/* OSError with the path, or EOFError of the path, the bytes that are expected and those that are there. */
static PyObject *told(const Held *held) {
    PyObject *path = held->files[held->failed].path;
    if (held->error) return errno = held->error, PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
    PyObject *end = Py_BuildValue("(OLL)", path, held->expected, held->found);
    if (end) PyErr_SetObject(PyExc_EOFError, end), Py_DecRef(end);
    return NULL;
}

/* --- Python ---------------------------------------------------------------------------------------------------------- */

static PyObject *combine(PyObject *self, PyObject *arguments) {
    PyObject *origins, *others, *outs, *result = NULL;
    Py_buffer types, moves, bare, counts, weights, gains = {0}, unchanged;
    Held from = {0}, to = {0}, origin = {0};
    int non_negative, is_double;
    if (!PyArg_ParseTuple(arguments, "O!O!O!y*y*y*y*y*z*w*pp", &PyTuple_Type, &origins, &PyTuple_Type, &others, &PyTuple_Type, &outs,
                          &types, &moves, &bare, &counts, &weights, &gains, &unchanged, &non_negative, &is_double)) return NULL;
    const Py_ssize_t T = PyTuple_Size(others), H = PyTuple_Size(outs), S = counts.len / 8;
    const size_t memory_bytes = (size_t)(H + 1) * BLOCK * (is_double ? 8 : 4);
    Py_ssize_t n = 0, window;
    int is_sound = 1;
    for (Py_ssize_t s = 0; s < S; s++) {
        const int64_t count = ((const int64_t *)counts.buf)[s];
        is_sound &= 0 <= count && count <= PY_SSIZE_T_MAX - n;
        n = is_sound ? n + (Py_ssize_t)count : 0;
    }
    void *memory = malloc(memory_bytes);
    if (!is_sound || PyTuple_Size(origins) != 1 || types.len != T + 2 || moves.len != T || bare.len != H || weights.len != 8 * S * H * T
        || (gains.buf && gains.len != 16 * S * H) || unchanged.len != 8 * H) {
        PyErr_SetString(PyExc_ValueError, "sizes do not match");
    } else if (!memory) {
        PyErr_NoMemory();
    } else if (hold(&origin, origins, (char *)types.buf + T, 0, n, PyBUF_SIMPLE)
               && hold(&from, others, types.buf, 1, n, PyBUF_SIMPLE)
               && hold(&to, outs, (char *)types.buf + T + 1, 0, n, PyBUF_WRITABLE)
               && (window = window_of(n, origin.value_bytes + from.value_bytes), 1)
               && make_windows(&origin, window) && make_windows(&from, window)) {
        if (window < n && S > 1) {
            PyErr_SetString(PyExc_ValueError, "only one segment can be read from files");
        } else {
            uint32_t bad = 0;
            int is_read = 1;
            Py_BEGIN_ALLOW_THREADS
            for (Py_ssize_t at = 0, count; at < n && !bad; at += count) {
                count = n - at < window ? n - at : window;
                is_read = show(&origin, at, count) && show(&from, at, count) && show(&to, at, count);
                if (!is_read) break;
                const int64_t whole = count;
                const Batch batch = {origin.pointers[0], (const char *const *)from.pointers, types.buf, moves.buf, bare.buf,
                                     to.pointers, weights.buf, gains.buf, S > 1 ? counts.buf : &whole, S, T, H, non_negative,
                                     unchanged.buf};
                bad = (is_double ? combine_double : combine_float)(&batch, memory);
            }
            Py_END_ALLOW_THREADS
            result = is_read ? PyBool_FromLong(!bad) : told(origin.expected ? &origin : &from);
        }
    }
    free(memory);
    let_go(&origin), let_go(&from), let_go(&to);
    PyBuffer_Release(&types), PyBuffer_Release(&moves), PyBuffer_Release(&bare), PyBuffer_Release(&counts);
    PyBuffer_Release(&weights), PyBuffer_Release(&unchanged);
    if (gains.buf) PyBuffer_Release(&gains);
    return result;
}

static PyObject *products(PyObject *self, PyObject *arguments) {
    PyObject *snapshots, *result = NULL;
    Py_buffer types, out, totals, moved;
    Held from = {0};
    Py_ssize_t n, window;
    if (!PyArg_ParseTuple(arguments, "O!y*nw*w*w*", &PyTuple_Type, &snapshots, &types, &n, &out, &totals, &moved)) return NULL;
    const Py_ssize_t T = PyTuple_Size(snapshots), P = (T + SIDE - 1) / SIDE * SIDE;
    char *memory = malloc((size_t)(P + 1) * BLOCK * 4 + LINE);
    if (n < 0 || types.len != T || out.len != 8 * P * P || totals.len != 8 * T || moved.len != T) {
        PyErr_SetString(PyExc_ValueError, "sizes do not match");
    } else if (!memory) {
        PyErr_NoMemory();
    } else if (hold(&from, snapshots, types.buf, 1, n, PyBUF_SIMPLE)
               && (window = window_of(n, from.value_bytes), make_windows(&from, window))) {
        float *rows = (float *)(memory + (LINE - (uintptr_t)memory % LINE) % LINE);
        int is_read = 1;
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t at = 0, count; at < n && is_read; at += count) {
            count = n - at < window ? n - at : window;
            is_read = show(&from, at, count);
            if (is_read)
                multiply((const char *const *)from.pointers, types.buf, T, count, out.buf, totals.buf, moved.buf, rows);
        }
        Py_END_ALLOW_THREADS
        result = is_read ? Py_NewRef(Py_None) : told(&from);
    }
    free(memory);
    let_go(&from);
    PyBuffer_Release(&types), PyBuffer_Release(&out), PyBuffer_Release(&totals), PyBuffer_Release(&moved);
    return result;
}

static PyMethodDef methods[] = {
    {"combine", combine, METH_VARARGS, NULL},
    {"products", products, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};
static PyModuleDef_Slot slots[] = {{0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernel", NULL, 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }
