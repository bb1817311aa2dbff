/* Lets the N-th system call below a folder fail, fall short, or end the process; and writes down which calls there are.
 *
 * Loaded before everything else (LD_PRELOAD), so that it sees what Python, numpy and Rust ask of the C library.
 * Its state lies in memory that is shared with forked processes: N counts the calls of all of them, and whoever
 * forked them sees how it ended, even by SIGKILL.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { OFF, WATCH, KILL, SIGNAL, FAIL, SHORT };

struct state {
    int mode, target, number; /* number: of the signal, or of the error */
    atomic_int count, fired;
    pid_t victim;
    int log;
    size_t root_size;
    char root[2048], call[16], path[4096];
};

static struct state *state;

__attribute__((constructor)) static void start(void) {
    void *memory = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory != MAP_FAILED) state = memory;
}

void shim_arm(const char *root, int mode, int target, int number, int log) {
    snprintf(state->root, sizeof state->root, "%s", root);
    state->root_size = strlen(state->root);
    state->target = target, state->number = number, state->log = log, state->victim = getpid();
    state->call[0] = state->path[0] = 0;
    atomic_store(&state->count, 0);
    atomic_store(&state->fired, 0);
    state->mode = mode;
}

void shim_disarm(void) { state->mode = OFF; }
int shim_count(void) { return atomic_load(&state->count); }
int shim_fired(void) { return atomic_load(&state->fired); }
const char *shim_call(void) { return state->call; }
const char *shim_path(void) { return state->path; }

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* A call that is under way. `action` is what becomes of it. */
struct call {
    enum { GO_ON, STOP, HALVE } action;
    int seen;
    const char *name;
    char path[4096], second[4096];
};

/* The absolute path of a name, or of an open file where there is none. */
static void resolve(char *out, size_t size, int folder, const char *name) {
    char link[64];
    ssize_t length = 0;
    out[0] = 0;
    if (name && name[0] == '/') {
        snprintf(out, size, "%s", name);
        return;
    }
    if (folder == AT_FDCWD) {
        if (!getcwd(out, size)) return;
        length = (ssize_t)strlen(out);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, out, size - 1);
        if (length < 0) length = 0;
        out[length] = 0;
    }
    if (name) snprintf(out + length, size - (size_t)length, "/%s", name);
}

static int below(const char *path) {
    return !strncmp(path, state->root, state->root_size) && (path[state->root_size] == '/' || !path[state->root_size]);
}

/* What is to become of a call; where it stops, errno is set. A file without a name is told by its descriptor. */
static void before(struct call *call, const char *name, int folder, const char *path, int second_folder, const char *second) {
    call->action = GO_ON, call->seen = 0;
    if (!state || state->mode == OFF) return;
    int kept = errno;
    resolve(call->path, sizeof call->path, folder, path);
    call->second[0] = 0;
    if (second) resolve(call->second, sizeof call->second, second_folder, second);
    call->seen = below(call->path) || (second && below(call->second));
    errno = kept;
    if (!call->seen) return;
    call->name = name;
    if (atomic_fetch_add(&state->count, 1) + 1 != state->target || state->mode == WATCH) return;
    snprintf(state->call, sizeof state->call, "%s", name);
    snprintf(state->path, sizeof state->path, "%s", call->path);
    atomic_store(&state->fired, 1);
    switch (state->mode) {
    case KILL:
        kill(state->victim, SIGKILL);
        for (;;) pause();
    case SIGNAL: kill(state->victim, state->number); break;
    case FAIL: errno = state->number, call->action = STOP; break;
    case SHORT: call->action = HALVE; break;
    default: break;
    }
}

static void after(const struct call *call, int succeeded) {
    if (!call->seen || state->mode != WATCH || state->log < 0) return;
    char line[9000];
    static long (*real)(long, ...);
    if (!real) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    int kept = errno;
    int size = snprintf(line, sizeof line, "%s\t%s\t%s\t%d\n", call->name, call->path, call->second, succeeded);
    real(SYS_write, state->log, line, (size_t)size);
    errno = kept;
}

#define SIMPLE(type, failed, real_call, ...) \
    struct call call; \
    before(&call, __VA_ARGS__); \
    if (call.action == STOP) return failed; \
    type result = real_call; \
    after(&call, result != failed); \
    return result

#define NO_SECOND AT_FDCWD, NULL

#define OPENS(name, folder, params, args) \
    int name params { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            mode = va_arg(more, mode_t); \
            va_end(more); \
        } \
        const char *how = flags & O_CREAT ? "create" : flags & (O_WRONLY | O_RDWR) ? "open-write" : "open-read"; \
        SIMPLE(int, -1, real args, how, folder, path, NO_SECOND); \
    }
OPENS(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPENS(openat, at, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPENS(openat64, at, (int at, const char *path, int flags, ...), (at, path, flags, mode))

/* Calls that may do less than they are asked to. */
#define PARTIAL(name, told, fd, size, params, args) \
    ssize_t name params { \
        REAL(name); \
        struct call call; \
        before(&call, told, fd, NULL, NO_SECOND); \
        if (call.action == STOP) return -1; \
        if (call.action == HALVE && size > 1) size /= 2; \
        ssize_t result = real args; \
        after(&call, result != -1); \
        return result; \
    }
PARTIAL(write, "write", fd, size, (int fd, const void *data, size_t size), (fd, data, size))
PARTIAL(pwrite, "pwrite", fd, size, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
PARTIAL(pwrite64, "pwrite", fd, size, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
PARTIAL(read, "read", fd, size, (int fd, void *data, size_t size), (fd, data, size))
PARTIAL(pread, "pread", fd, size, (int fd, void *data, size_t size, off_t at), (fd, data, size, at))
PARTIAL(pread64, "pread", fd, size, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at))
PARTIAL(sendfile, "sendfile", to, size, (int to, int from, off_t *at, size_t size), (to, from, at, size))
PARTIAL(sendfile64, "sendfile", to, size, (int to, int from, off64_t *at, size_t size), (to, from, at, size))
PARTIAL(copy_file_range, "copy-range", to, size,
        (int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags), (from, at, to, there, size, flags))

/* The same with a list of buffers; a list of one is cut. */
#define VECTOR(name, told, params, args) \
    ssize_t name params { \
        REAL(name); \
        struct call call; \
        before(&call, told, fd, NULL, NO_SECOND); \
        if (call.action == STOP) return -1; \
        struct iovec half; \
        if (call.action == HALVE && count == 1 && buffers[0].iov_len > 1) \
            half = buffers[0], half.iov_len /= 2, buffers = &half; \
        ssize_t result = real args; \
        after(&call, result != -1); \
        return result; \
    }
VECTOR(writev, "writev", (int fd, const struct iovec *buffers, int count), (fd, buffers, count))
VECTOR(pwritev, "pwritev", (int fd, const struct iovec *buffers, int count, off_t at), (fd, buffers, count, at))
VECTOR(pwritev64, "pwritev", (int fd, const struct iovec *buffers, int count, off64_t at), (fd, buffers, count, at))
VECTOR(readv, "readv", (int fd, const struct iovec *buffers, int count), (fd, buffers, count))
VECTOR(preadv, "preadv", (int fd, const struct iovec *buffers, int count, off_t at), (fd, buffers, count, at))
VECTOR(preadv64, "preadv", (int fd, const struct iovec *buffers, int count, off64_t at), (fd, buffers, count, at))
VECTOR(preadv2, "preadv", (int fd, const struct iovec *buffers, int count, off_t at, int flags), (fd, buffers, count, at, flags))
VECTOR(preadv64v2, "preadv", (int fd, const struct iovec *buffers, int count, off64_t at, int flags),
       (fd, buffers, count, at, flags))

int fsync(int fd) { REAL(fsync); SIMPLE(int, -1, real(fd), "fsync", fd, NULL, NO_SECOND); }
int fdatasync(int fd) { REAL(fdatasync); SIMPLE(int, -1, real(fd), "fsync", fd, NULL, NO_SECOND); }
int flock(int fd, int how) { REAL(flock); SIMPLE(int, -1, real(fd, how), "flock", fd, NULL, NO_SECOND); }
int ftruncate(int fd, off_t size) { REAL(ftruncate); SIMPLE(int, -1, real(fd, size), "ftruncate", fd, NULL, NO_SECOND); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); SIMPLE(int, -1, real(fd, size), "ftruncate", fd, NULL, NO_SECOND); }
int fallocate(int fd, int how, off_t at, off_t size) {
    REAL(fallocate);
    SIMPLE(int, -1, real(fd, how, at, size), "fallocate", fd, NULL, NO_SECOND);
}
int fallocate64(int fd, int how, off64_t at, off64_t size) {
    REAL(fallocate64);
    SIMPLE(int, -1, real(fd, how, at, size), "fallocate", fd, NULL, NO_SECOND);
}
int mkdir(const char *path, mode_t mode) { REAL(mkdir); SIMPLE(int, -1, real(path, mode), "mkdir", AT_FDCWD, path, NO_SECOND); }
int mkdirat(int at, const char *path, mode_t mode) {
    REAL(mkdirat);
    SIMPLE(int, -1, real(at, path, mode), "mkdir", at, path, NO_SECOND);
}
int rmdir(const char *path) { REAL(rmdir); SIMPLE(int, -1, real(path), "rmdir", AT_FDCWD, path, NO_SECOND); }
int unlink(const char *path) { REAL(unlink); SIMPLE(int, -1, real(path), "unlink", AT_FDCWD, path, NO_SECOND); }
int unlinkat(int at, const char *path, int flags) {
    REAL(unlinkat);
    SIMPLE(int, -1, real(at, path, flags), flags & AT_REMOVEDIR ? "rmdir" : "unlink", at, path, NO_SECOND);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    SIMPLE(int, -1, real(from, to), "rename", AT_FDCWD, from, AT_FDCWD, to);
}
int renameat(int at, const char *from, int there, const char *to) {
    REAL(renameat);
    SIMPLE(int, -1, real(at, from, there, to), "rename", at, from, there, to);
}
static const char *rename_kind(unsigned flags) { return flags & RENAME_EXCHANGE ? "exchange" : "rename"; }
int renameat2(int at, const char *from, int there, const char *to, unsigned flags) {
    REAL(renameat2);
    SIMPLE(int, -1, real(at, from, there, to, flags), rename_kind(flags), at, from, there, to);
}
int link(const char *from, const char *to) {
    REAL(link);
    SIMPLE(int, -1, real(from, to), "link", AT_FDCWD, from, AT_FDCWD, to);
}
int linkat(int at, const char *from, int there, const char *to, int flags) {
    REAL(linkat);
    SIMPLE(int, -1, real(at, from, there, to, flags), "link", at, from, there, to);
}
int symlink(const char *text, const char *path) {
    REAL(symlink);
    SIMPLE(int, -1, real(text, path), "symlink", AT_FDCWD, path, NO_SECOND);
}

/* What has no function in an older C library is asked for by number. */
long syscall(long number, ...) {
    REAL(syscall);
    long a[6];
    va_list more;
    va_start(more, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(more, long);
    va_end(more);
    if (number != SYS_renameat2) return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    SIMPLE(long, -1, real(number, a[0], a[1], a[2], a[3], a[4]), rename_kind((unsigned)a[4]), (int)a[0], (const char *)a[1],
           (int)a[2], (const char *)a[3]);
}

#define MAPS(name, offset) \
    void *name(void *at, size_t size, int protection, int flags, int fd, offset begin) { \
        REAL(name); \
        if (fd < 0 || !state || state->mode == OFF) return real(at, size, protection, flags, fd, begin); \
        SIMPLE(void *, MAP_FAILED, real(at, size, protection, flags, fd, begin), "mmap", fd, NULL, NO_SECOND); \
    }
MAPS(mmap, off_t)
MAPS(mmap64, off64_t)
