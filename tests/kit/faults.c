/* A library for LD_PRELOAD: makes chosen system calls fail, kill their process, or say nothing and be counted.

   FAULTS holds rules, separated by ';', each "call|what|first-last|path":
     call   the name of a function below
     what   an errno, -signal to kill the process by that signal instead, or 0 only to count;
            "lie" (flock and fsync) to report success without doing anything;
            "done" and an errno (link and rename) to do it and report a failure, as when a server's answer is lost
     first-last   which of the calls that fit, counted from 1 over all processes; 0 for last: all that follow
     path   a part of the file's path, or with '$' behind it its end; empty for any
   FAULTS_COUNTS names a file of one 64-bit counter a rule, shared by all processes: how many calls fitted. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_RULES 64
#define LIE 100000
#define DONE 200000
struct rule { char call[24]; int what; unsigned long first, last; char path[256]; };
static struct rule rules[MAX_RULES];
static int rule_count = -1;
static uint64_t *counts, own_counts[MAX_RULES];
static __thread int inside;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

static void set_up(void) {
    const char *text = getenv("FAULTS"), *file = getenv("FAULTS_COUNTS");
    int count = 0;
    counts = own_counts;
    for (const char *at = text; at && *at && count < MAX_RULES; at = strchr(at, ';') ? strchr(at, ';') + 1 : NULL) {
        struct rule *rule = &rules[count];
        char what[16] = "";
        rule->path[0] = 0;
        if (sscanf(at, "%23[^|]|%15[^|]|%lu-%lu|%255[^;]", rule->call, what, &rule->first, &rule->last, rule->path) < 4) abort();
        rule->what = !strcmp(what, "lie") ? LIE : !strncmp(what, "done", 4) ? DONE + atoi(what + 4) : atoi(what);
        count++;
    }
    if (file) {
        int descriptor = REAL(open)(file, O_RDWR | O_CLOEXEC);
        if (descriptor < 0) abort();
        void *shared = REAL(mmap)(NULL, sizeof own_counts, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
        REAL(close)(descriptor);
        if (shared == MAP_FAILED) abort();
        counts = shared;
    }
    rule_count = count;
}

/* Read the rules again at the next call: a process that has been forked gets rules of its own. */
void faults_again(void) { rule_count = -1; }

static int fits(const char *path, const char *part) {
    size_t length = strlen(part), whole = strlen(path);
    if (part[length - 1] != '$') return strstr(path, part) != NULL;
    return whole >= length - 1 && !strncmp(path + whole - (length - 1), part, length - 1);
}

/* Whether a write reaches no disk: a pipe between processes does not fail, and what is written to standard error
   could not be said otherwise. */
static int reaches_no_disk(int descriptor) {
    struct stat status;
    return descriptor == 2 || REAL(fstat)(descriptor, &status) || !S_ISREG(status.st_mode);
}

/* Return the errno that this call is to fail with, 0 if it is not, or LIE. */
static int fault(const char *call, const char *path, int descriptor) {
    if (inside) return 0;
    inside = 1;
    if (rule_count < 0) set_up();
    int error = 0;
    char of_descriptor[4096] = "";
    for (int number = 0; number < rule_count; number++) {
        struct rule *rule = &rules[number];
        if (strcmp(rule->call, call)) continue;
        if (rule->path[0]) {
            if (!path && descriptor >= 0) {
                char link[64];
                snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
                ssize_t length = readlink(link, of_descriptor, sizeof of_descriptor - 1);
                of_descriptor[length < 0 ? 0 : length] = 0;
                path = of_descriptor;
            }
            if (!path || !fits(path, rule->path)) continue;
        } else if (!strcmp(call, "write") && reaches_no_disk(descriptor))
            continue;
        uint64_t time = __atomic_add_fetch(&counts[number], 1, __ATOMIC_SEQ_CST);
        if (time < rule->first || (rule->last && time > rule->last) || !rule->what) continue;
        if (rule->what < 0) {
            kill(getpid(), -rule->what);
            continue;
        }
        error = rule->what;
    }
    inside = 0;
    return error;
}

#define FAIL(call, path, descriptor, result)                       \
    do {                                                           \
        int error_ = fault(call, path, descriptor);                \
        if (error_ && error_ != LIE) { errno = error_; return result; } \
    } while (0)

#define PUBLISH(call, path, real_call)                             \
    int error_ = fault(call, path, -1);                            \
    if (error_ && error_ < LIE) { errno = error_; return -1; }     \
    int result_ = real_call;                                       \
    if (error_ >= DONE && !result_) { errno = error_ - DONE; return -1; } \
    return result_;

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        FAIL("open", path, -1, -1);                                             \
        return REAL(name)(path, flags, mode);                                   \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                            \
    int name(int folder, const char *path, int flags, ...) {                    \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        FAIL("open", path, -1, -1);                                             \
        return REAL(name)(folder, path, flags, mode);                           \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int d, void *to, size_t n) { FAIL("read", NULL, d, -1); return REAL(read)(d, to, n); }
ssize_t pread(int d, void *to, size_t n, off_t at) { FAIL("read", NULL, d, -1); return REAL(pread)(d, to, n, at); }
ssize_t pread64(int d, void *to, size_t n, off64_t at) { FAIL("read", NULL, d, -1); return REAL(pread64)(d, to, n, at); }
ssize_t preadv(int d, const struct iovec *to, int n, off_t at) { FAIL("read", NULL, d, -1); return REAL(preadv)(d, to, n, at); }
ssize_t preadv64(int d, const struct iovec *to, int n, off64_t at) { FAIL("read", NULL, d, -1); return REAL(preadv64)(d, to, n, at); }
ssize_t preadv2(int d, const struct iovec *to, int n, off_t at, int how) { FAIL("read", NULL, d, -1); return REAL(preadv2)(d, to, n, at, how); }
ssize_t preadv64v2(int d, const struct iovec *to, int n, off64_t at, int how) { FAIL("read", NULL, d, -1); return REAL(preadv64v2)(d, to, n, at, how); }
ssize_t write(int d, const void *from, size_t n) { FAIL("write", NULL, d, -1); return REAL(write)(d, from, n); }
ssize_t pwrite(int d, const void *from, size_t n, off_t at) { FAIL("write", NULL, d, -1); return REAL(pwrite)(d, from, n, at); }
ssize_t pwrite64(int d, const void *from, size_t n, off64_t at) { FAIL("write", NULL, d, -1); return REAL(pwrite64)(d, from, n, at); }
int fsync(int d) { int e = fault("fsync", NULL, d); if (e == LIE) return 0; if (e) { errno = e; return -1; } return REAL(fsync)(d); }
int fdatasync(int d) { FAIL("fsync", NULL, d, -1); return REAL(fdatasync)(d); }
int ftruncate(int d, off_t n) { FAIL("ftruncate", NULL, d, -1); return REAL(ftruncate)(d, n); }
int ftruncate64(int d, off64_t n) { FAIL("ftruncate", NULL, d, -1); return REAL(ftruncate64)(d, n); }
int posix_fallocate(int d, off_t at, off_t n) { int e = fault("fallocate", NULL, d); return e ? e : REAL(posix_fallocate)(d, at, n); }
int posix_fallocate64(int d, off64_t at, off64_t n) { int e = fault("fallocate", NULL, d); return e ? e : REAL(posix_fallocate64)(d, at, n); }
int rename(const char *from, const char *to) { PUBLISH("rename", to, REAL(rename)(from, to)) }
int renameat(int a, const char *from, int b, const char *to) { PUBLISH("rename", to, REAL(renameat)(a, from, b, to)) }
int link(const char *from, const char *to) { PUBLISH("link", to, REAL(link)(from, to)) }
int linkat(int a, const char *from, int b, const char *to, int f) { PUBLISH("link", to, REAL(linkat)(a, from, b, to, f)) }
int unlink(const char *path) { FAIL("unlink", path, -1, -1); return REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int f) { FAIL("unlink", path, -1, -1); return REAL(unlinkat)(folder, path, f); }
int mkdir(const char *path, mode_t mode) { FAIL("mkdir", path, -1, -1); return REAL(mkdir)(path, mode); }
int stat(const char *path, struct stat *to) { FAIL("stat", path, -1, -1); return REAL(stat)(path, to); }
int stat64(const char *path, struct stat64 *to) { FAIL("stat", path, -1, -1); return REAL(stat64)(path, to); }
int lstat(const char *path, struct stat *to) { FAIL("stat", path, -1, -1); return REAL(lstat)(path, to); }
int lstat64(const char *path, struct stat64 *to) { FAIL("stat", path, -1, -1); return REAL(lstat64)(path, to); }
int fstatat(int a, const char *path, struct stat *to, int f) { FAIL("stat", path, -1, -1); return REAL(fstatat)(a, path, to, f); }
int fstatat64(int a, const char *path, struct stat64 *to, int f) { FAIL("stat", path, -1, -1); return REAL(fstatat64)(a, path, to, f); }
int fstat(int d, struct stat *to) { FAIL("fstat", NULL, d, -1); return REAL(fstat)(d, to); }
int fstat64(int d, struct stat64 *to) { FAIL("fstat", NULL, d, -1); return REAL(fstat64)(d, to); }
int statvfs(const char *path, struct statvfs *to) { FAIL("statvfs", path, -1, -1); return REAL(statvfs)(path, to); }
int statvfs64(const char *path, struct statvfs64 *to) { FAIL("statvfs", path, -1, -1); return REAL(statvfs64)(path, to); }
int access(const char *path, int mode) { FAIL("access", path, -1, -1); return REAL(access)(path, mode); }
char *getcwd(char *to, size_t n) { FAIL("getcwd", NULL, -1, NULL); return REAL(getcwd)(to, n); }
DIR *opendir(const char *path) { FAIL("opendir", path, -1, NULL); return REAL(opendir)(path); }
struct dirent *readdir(DIR *folder) { FAIL("readdir", NULL, dirfd(folder), NULL); return REAL(readdir)(folder); }
struct dirent64 *readdir64(DIR *folder) { FAIL("readdir", NULL, dirfd(folder), NULL); return REAL(readdir64)(folder); }
void *mmap(void *at, size_t n, int prot, int flags, int d, off_t from) { FAIL("mmap", NULL, d, MAP_FAILED); return REAL(mmap)(at, n, prot, flags, d, from); }
void *mmap64(void *at, size_t n, int prot, int flags, int d, off64_t from) { FAIL("mmap", NULL, d, MAP_FAILED); return REAL(mmap64)(at, n, prot, flags, d, from); }
pid_t fork(void) { FAIL("fork", NULL, -1, -1); return REAL(fork)(); }
int shm_open(const char *name, int flags, mode_t mode) { FAIL("shm_open", name, -1, -1); return REAL(shm_open)(name, flags, mode); }
int flock(int d, int operation) { int e = fault("flock", NULL, d); if (e == LIE) return 0; if (e) { errno = e; return -1; } return REAL(flock)(d, operation); }
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument) {
    int error = fault("pthread_create", NULL, -1);
    return error ? error : REAL(pthread_create)(thread, attributes, start, argument);
}
