/* dlpack.h: the part of the DLPack 1.x binary interface (dmlc.github.io/dlpack) that is needed to read tensors and
 * to export results: struct layouts and constants only. The interface determines the order and width of members; the
 * names are those of this project. */
#ifndef DHSA_PYTHON_DLPACK_H
#define DHSA_PYTHON_DLPACK_H

#include <stdint.h>

enum { DL_CPU = 1 };
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_COMPLEX = 5, DL_BOOL = 6 };
#define DL_READ_ONLY ((uint64_t)1)

typedef struct {
    uint32_t major, minor;
} dl_version;

typedef struct {
    int32_t type, id;
} dl_device;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} dl_dtype;

typedef struct {
    void *data;
    dl_device device;
    int32_t ndim;
    dl_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; before version 1.2 NULL means contiguous */
    uint64_t byte_offset;
} dl_tensor;

/* What a capsule named "dltensor" points to. */
typedef struct dl_managed {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *self);
} dl_managed;

/* What a capsule named "dltensor_versioned" points to. */
typedef struct dl_managed_versioned {
    dl_version version;
    void *context;
    void (*deleter)(struct dl_managed_versioned *self);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_versioned;

/* What the capsule type.__dlpack_c_exchange_api__, named "dlpack_exchange_api", points to: the exchange of
 * __dlpack__ in plain C calls, which cost a tenth. Of the functions only `from_object` is used; the others are
 * declared without their arguments. */
typedef struct dl_exchange {
    dl_version version;
    struct dl_exchange *previous; /* an older interface of the same library, or NULL */
    void (*allocate)(void);
    int (*from_object)(void *object,
                       dl_managed_versioned **out); /* 0: a new reference in *out; else an exception is set */
    void (*to_object)(void);
    void (*borrow)(void);
    void (*stream)(void);
} dl_exchange;

#endif
