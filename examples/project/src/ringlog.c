/*
 * ringlog: a log file that never grows. Its space is reserved when it is made, so that appending works on a full file
 * system, and the newest line takes the place of the oldest.
 *
 * The file is made of records of 128 bytes, readable as text: a header, then one record for each slot.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RECORD 128
#define MAX_SLOTS 1000000UL
#define HEADER "ringlog 1 slots=%8lu next=%8lu count=%8lu"

struct ring {
    const char *path;
    FILE *file;
    unsigned long slots, next, count;
};

static int complain(const char *path, const char *why)
{
    fprintf(stderr, "ringlog: %s: %s\n", path, why);
    return -1;
}

static int complain_errno(const char *path)
{
    return complain(path, strerror(errno));
}

/* Write one record: the text, padded with NUL, and a newline so that the file can be read with tools for text. */
static int put_record(FILE *file, const char *text)
{
    char record[RECORD] = {0};

    strncpy(record, text, RECORD - 1);
    record[RECORD - 1] = '\n';
    return fwrite(record, RECORD, 1, file) == 1 ? 0 : -1;
}

static int put_header(const struct ring *ring)
{
    char text[RECORD];

    snprintf(text, sizeof text, HEADER, ring->slots, ring->next, ring->count);
    if (fseek(ring->file, 0, SEEK_SET) != 0)
        return -1;
    return put_record(ring->file, text);
}

/* What was written counts only when flush, fsync and close have succeeded: a full disk may show up in each of them. */
static int finish(FILE *file)
{
    int failed = fflush(file) != 0 || fsync(fileno(file)) != 0, cause = errno;

    if (fclose(file) != 0 && !failed) {
        failed = 1;
        cause = errno;
    }
    errno = cause;
    return failed ? -1 : 0;
}

static int open_ring(struct ring *ring, const char *path, const char *mode)
{
    char text[RECORD + 1] = {0};
    long size = -1;

    ring->path = path;
    ring->file = fopen(path, mode);
    if (ring->file == NULL)
        return complain_errno(path);
    if (mode[1] == '+' && lockf(fileno(ring->file), F_LOCK, 0) != 0)
        return complain_errno(path);
    if (fread(text, RECORD, 1, ring->file) == 1 && fseek(ring->file, 0, SEEK_END) == 0)
        size = ftell(ring->file);
    if (sscanf(text, HEADER, &ring->slots, &ring->next, &ring->count) != 3 || ring->slots < 1 ||
        ring->slots > MAX_SLOTS || ring->next >= ring->slots || ring->count > ring->slots ||
        size != (long)(ring->slots + 1) * RECORD)
        return complain(path, "not a ring, or damaged");
    return 0;
}

/* Read the line number `age`, counted from the oldest one that is still there. */
static int get_line(const struct ring *ring, unsigned long age, char *text)
{
    unsigned long slot = (ring->next + ring->slots - ring->count + age) % ring->slots;

    if (fseek(ring->file, (long)(slot + 1) * RECORD, SEEK_SET) != 0 || fread(text, RECORD, 1, ring->file) != 1)
        return complain(ring->path, "cannot be read");
    text[RECORD - 1] = '\0';
    return 0;
}

/* Write the header and every slot, so that all the space is really there, with the newest lines of `old` if it is one. */
static int fill(struct ring *ring, const struct ring *old)
{
    unsigned long slot, skip = 0;
    char text[RECORD] = "";

    if (old != NULL) {
        ring->count = old->count < ring->slots ? old->count : ring->slots;
        ring->next = ring->count % ring->slots;
        skip = old->count - ring->count;
    }
    if (put_header(ring) != 0)
        return complain_errno(ring->path);
    for (slot = 0; slot < ring->slots; slot++) {
        text[0] = '\0';
        if (slot < ring->count && get_line(old, skip + slot, text) != 0)
            return -1;
        if (put_record(ring->file, text) != 0)
            return complain_errno(ring->path);
    }
    return 0;
}

/* Make a ring beside `path` and rename it over `path`: all of it or nothing, and on the same file system. */
static int make_ring(const char *path, unsigned long slots, const struct ring *old)
{
    struct ring ring = {path, NULL, slots, 0, 0};
    char beside[4096];
    int status;

    if (snprintf(beside, sizeof beside, "%s.%ld.new", path, (long)getpid()) >= (int)sizeof beside)
        return complain(path, "name too long");
    ring.file = fopen(beside, "wb");
    if (ring.file == NULL)
        return complain_errno(path);
    status = fill(&ring, old);
    if (finish(ring.file) != 0 && status == 0)
        status = complain_errno(path);
    if (status == 0 && rename(beside, path) != 0)
        status = complain_errno(path);
    if (status != 0)
        unlink(beside);
    return status;
}

static int create(const char *path, unsigned long slots)
{
    if (access(path, F_OK) == 0)
        return complain(path, "exists");
    return make_ring(path, slots, NULL);
}

static int resize(const char *path, unsigned long slots)
{
    struct ring old;

    if (open_ring(&old, path, "r+b") != 0)
        return -1;
    return make_ring(path, slots, &old);
}

static int append(const char *path)
{
    struct ring ring;
    char line[RECORD + 1];
    int status = 0;

    if (open_ring(&ring, path, "r+b") != 0)
        return -1;
    while (status == 0 && fgets(line, sizeof line, stdin) != NULL) {
        size_t length = strcspn(line, "\n");

        line[length] = '\0';
        if (length >= RECORD) {
            status = complain("standard input", "line longer than 127 bytes");
            break;
        }
        if (fseek(ring.file, (long)(ring.next + 1) * RECORD, SEEK_SET) != 0 || put_record(ring.file, line) != 0)
            status = complain_errno(path);
        ring.next = (ring.next + 1) % ring.slots;
        ring.count += ring.count < ring.slots;
    }
    if (put_header(&ring) != 0 || finish(ring.file) != 0)
        status = complain_errno(path);
    return status;
}

static int show(const char *path)
{
    struct ring ring;
    char text[RECORD];
    unsigned long age;

    if (open_ring(&ring, path, "rb") != 0)
        return -1;
    for (age = 0; age < ring.count; age++) {
        if (get_line(&ring, age, text) != 0)
            return -1;
        puts(text);
    }
    return fflush(stdout) == 0 ? 0 : complain_errno("standard output");
}

static int usage(void)
{
    fputs("usage: ringlog create|resize FILE SLOTS\n       ringlog append|show FILE\n", stderr);
    return 2;
}

int main(int argc, char **argv)
{
    const char *command = argc > 1 ? argv[1] : "";
    unsigned long slots = 0;
    char *end = "";

    if (argc == 4) {
        slots = strtoul(argv[3], &end, 10);
        if (*end != '\0' || slots < 1 || slots > MAX_SLOTS)
            return usage();
        if (strcmp(command, "create") == 0)
            return create(argv[2], slots) != 0;
        if (strcmp(command, "resize") == 0)
            return resize(argv[2], slots) != 0;
    }
    if (argc == 3 && strcmp(command, "append") == 0)
        return append(argv[2]) != 0;
    if (argc == 3 && strcmp(command, "show") == 0)
        return show(argv[2]) != 0;
    return usage();
}
