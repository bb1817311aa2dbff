/* Preloaded by tests/read_faults.py: fails the N-th open, read or mapping of a file below a folder with an error. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static char top[PATH_MAX], last[PATH_MAX];
static int seen, wanted, code;
static FILE *list;

void fault_arm(const char *folder, int number, int error, const char *log) {
    strncpy(top, folder, sizeof top - 1);
    seen = 0, wanted = number, code = error, last[0] = 0;
    list = log ? fopen(log, "w") : NULL;
}
const char *fault_path(void) { return last; }

static int fails(const char *what, int fd, const char *path) {
    char found[PATH_MAX] = "", link[64];
    if (!top[0]) return 0;
    if (path && path[0] == '/') {
        strncpy(found, path, sizeof found - 1);
    } else if (path) {
        if (!getcwd(found, sizeof found)) return 0;
        strncat(found, "/", sizeof found - strlen(found) - 1);
        strncat(found, path, sizeof found - strlen(found) - 1);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t count = readlink(link, found, sizeof found - 1);
        found[count > 0 ? count : 0] = 0;
    }
    if (strncmp(found, top, strlen(top))) return 0;
    seen++;
    if (list) fprintf(list, "%s %s\n", what, found), fflush(list);
    if (seen != wanted) return 0;
    strcpy(last, found);
    errno = code;
    return 1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define MODE() mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, int); va_end(a); }
#define READS(path) (!(flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails("open", -1, path))

int open(const char *path, int flags, ...) { REAL(open); MODE(); return READS(path) ? -1 : real(path, flags, mode); }
int open64(const char *path, int flags, ...) { REAL(open64); MODE(); return READS(path) ? -1 : real(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) {
    REAL(openat); MODE();
    return at == AT_FDCWD && READS(path) ? -1 : real(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    REAL(openat64); MODE();
    return at == AT_FDCWD && READS(path) ? -1 : real(at, path, flags, mode);
}
ssize_t read(int fd, void *to, size_t n) { REAL(read); return fails("read", fd, NULL) ? -1 : real(fd, to, n); }
ssize_t pread(int fd, void *to, size_t n, off_t at) { REAL(pread); return fails("pread", fd, NULL) ? -1 : real(fd, to, n, at); }
ssize_t pread64(int fd, void *to, size_t n, off64_t at) { REAL(pread64); return fails("pread", fd, NULL) ? -1 : real(fd, to, n, at); }
ssize_t preadv(int fd, const struct iovec *to, int n, off_t at) { REAL(preadv); return fails("preadv", fd, NULL) ? -1 : real(fd, to, n, at); }
ssize_t preadv64(int fd, const struct iovec *to, int n, off64_t at) { REAL(preadv64); return fails("preadv", fd, NULL) ? -1 : real(fd, to, n, at); }
ssize_t preadv64v2(int fd, const struct iovec *to, int n, off64_t at, int how) { REAL(preadv64v2); return fails("preadv", fd, NULL) ? -1 : real(fd, to, n, at, how); }
void *mmap(void *to, size_t n, int may, int flags, int fd, off_t at) { REAL(mmap); return fd >= 0 && fails("mmap", fd, NULL) ? MAP_FAILED : real(to, n, may, flags, fd, at); }
void *mmap64(void *to, size_t n, int may, int flags, int fd, off64_t at) { REAL(mmap64); return fd >= 0 && fails("mmap", fd, NULL) ? MAP_FAILED : real(to, n, may, flags, fd, at); }
