/* Fails or kills a process at the k-th call that changes a file below watched folders.
 *
 * Preloaded (LD_PRELOAD), so that Python, C++ and Rust are counted alike. `shim_arm` says what to do from now on, `shim_count` how many calls were seen.
 * A call is one of: open for writing, write (also at a position, of vectors, by sendfile), truncate, fsync, rename, mkdir, and, where processes are
 * killed, also unlink, rmdir and chmod. Failing those three would only fail the cleaning up.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL, SHORT };
enum { FDS = 65536 };
static int mode, error_number, persistent;
static long at, seen;
static char root[PATH_MAX];
static char watched_fd[FDS];

void shim_arm(int what, long when, int error, int forever, const char *folder) {
    mode = what, at = when, error_number = error, persistent = forever, seen = 0;
    strncpy(root, folder, sizeof root - 1);
}
long shim_count(void) { return seen; }

static int below(int folder, const char *path) {
    char whole[2 * PATH_MAX], link[64];
    if (!root[0] || !path) return 0;
    if (path[0] == '/') return strncmp(path, root, strlen(root)) == 0;
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, whole, PATH_MAX - 1);
        if (length < 0) return 0;
        whole[length] = 0;
    }
    return strncmp(whole, root, strlen(root)) == 0;
}
static int of(int fd) { return fd >= 0 && fd < FDS && watched_fd[fd]; }

/* 0: go on, 1: fail with errno set, 2: write half */
static int now(int is_watched, int removes) {
    if (!is_watched || (removes && mode != KILL && mode != COUNT)) return 0;
    if (removes && mode == COUNT && !persistent) return 0; /* counting for failures */
    long number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (mode == COUNT || (persistent && mode == FAIL ? number < at : number != at)) return 0;
    if (mode == KILL) kill(getpid(), SIGKILL);
    if (mode == SHORT) return 2;
    errno = error_number;
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = dlsym(RTLD_NEXT, name)
#define WRITES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))

static int opened(int fd, int is_watched) {
    if (fd >= 0 && fd < FDS) watched_fd[fd] = (char)is_watched;
    return fd;
}
static mode_t mode_of(int flags, va_list list) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list list; va_start(list, flags); mode_t m = mode_of(flags, list); va_end(list); \
        int w = WRITES(flags) && below(AT_FDCWD, path); \
        return now(w, 0) == 1 ? -1 : opened(real(path, flags, m), w); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list list; va_start(list, flags); mode_t m = mode_of(flags, list); va_end(list); \
        int w = WRITES(flags) && below(folder, path); \
        return now(w, 0) == 1 ? -1 : opened(real(folder, path, flags, m), w); \
    }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(FILE *, #name, const char *, const char *); \
        int w = (strchr(how, 'w') || strchr(how, 'a') || strchr(how, '+')) && below(AT_FDCWD, path); \
        if (now(w, 0) == 1) return NULL; \
        FILE *file = real(path, how); \
        if (file) opened(fileno(file), w); \
        return file; \
    }
FOPEN(fopen)
FOPEN(fopen64)
int close(int fd) {
    REAL(int, "close", int);
    if (fd >= 0 && fd < FDS) watched_fd[fd] = 0;
    return real(fd);
}
ssize_t write(int fd, const void *data, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    int what = now(of(fd), 0);
    return what == 1 ? -1 : real(fd, data, what == 2 && count > 1 ? count / 2 : count);
}
#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t count, off_t offset) { \
        REAL(ssize_t, #name, int, const void *, size_t, off_t); \
        int what = now(of(fd), 0); \
        return what == 1 ? -1 : real(fd, data, what == 2 && count > 1 ? count / 2 : count, offset); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)
ssize_t writev(int fd, const struct iovec *vectors, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    int what = now(of(fd), 0);
    return what == 1 ? -1 : real(fd, vectors, what == 2 && count > 1 ? count / 2 : count);
}
#define SENDFILE(name) \
    ssize_t name(int out, int in, off_t *offset, size_t count) { \
        REAL(ssize_t, #name, int, int, off_t *, size_t); \
        int what = now(of(out), 0); \
        return what == 1 ? -1 : real(out, in, offset, what == 2 && count > 1 ? count / 2 : count); \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t count, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    int what = now(of(out), 0);
    return what == 1 ? -1 : real(in, from, out, to, what == 2 && count > 1 ? count / 2 : count, flags);
}
/* files and folders are synced through descriptors that were opened for reading: their names are asked for */
#define ON_FD(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        char link[64], path[PATH_MAX]; \
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd); \
        ssize_t length = readlink(link, path, sizeof path - 1); \
        path[length < 0 ? 0 : length] = 0; \
        return now(below(AT_FDCWD, path[0] ? path : NULL), 0) == 1 ? -1 : real(fd); \
    }
ON_FD(fsync)
ON_FD(fdatasync)
int ftruncate64(int fd, off64_t size) {
    REAL(int, "ftruncate64", int, off64_t);
    return now(of(fd), 0) == 1 ? -1 : real(fd, size);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return now(below(AT_FDCWD, to), 0) == 1 ? -1 : real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return now(below(b, to), 0) == 1 ? -1 : real(a, from, b, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    return now(below(b, to), 0) == 1 ? -1 : real(a, from, b, to, flags);
}
int mkdir(const char *path, mode_t m) {
    REAL(int, "mkdir", const char *, mode_t);
    return now(below(AT_FDCWD, path), 0) == 1 ? -1 : real(path, m);
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return now(below(AT_FDCWD, path), 1) == 1 ? -1 : real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    return now(below(folder, path), 1) == 1 ? -1 : real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    return now(below(AT_FDCWD, path), 1) == 1 ? -1 : real(path);
}
int chmod(const char *path, mode_t m) {
    REAL(int, "chmod", const char *, mode_t);
    return now(below(AT_FDCWD, path), 1) == 1 ? -1 : real(path, m);
}
