#!/bin/sh
# What ringlog promises on a full or read-only file system. Mounts a tmpfs of 64 KiB, so only root can run it.
cd "$(dirname "$0")/.." || exit 1
if [ "$(id -u)" -ne 0 ]; then
    echo "1..0 # SKIP only root can mount a file system; this is $(id -un)"
    exit 0
fi
planned=11
# shellcheck source-path=SCRIPTDIR source=lib.sh
. tests/lib.sh
disk=$work/disk
ring=$disk/a.ring

small_tmpfs() {
    case $(uname -s) in
        DragonFly | NetBSD) mount_tmpfs -s 65536 tmpfs "$disk" ;;
        *) mount -t tmpfs -o size=64k tmpfs "$disk" ;;
    esac
}

read_only() {
    case $(uname -s) in
        Linux) mount -o remount,ro "$disk" ;;
        *) mount -u -o ro "$disk" ;;
    esac
}

cleanup() {
    umount "$disk" 2>/dev/null
    rm -rf "$work"
}

fill_up() { dd if=/dev/zero of="$disk/fill" bs=4096 2>/dev/null || :; }

only() { [ "$(ls -A "$disk")" = "$(printf '%s\n' "$@")" ] || ! ls -A "$disk"; }

mkdir "$disk"
if ! why=$(small_tmpfs 2>&1); then
    echo "Bail out! cannot mount a tmpfs: $why"
    exit 1
fi

check "makes a ring on the mount" "$ringlog" create "$ring" 100
check "and leaves nothing beside it" only a.ring
put "$ring" one two
check "resizes on the mount" "$ringlog" resize "$ring" 120
fill_up
# Small enough for the C library's buffer: that there is no space shows only when the file is closed.
check "a full file system takes no new ring" \
    fails 1 "ringlog: $disk/b.ring: No space left on device" "$ringlog" create "$disk/b.ring" 10
check "and keeps no half of one" only a.ring fill
check "a ring on it still takes lines" put "$ring" three
check "and shows them" holds "$ring" one two three
check "but cannot grow" fails 1 "ringlog: $ring: No space left on device" "$ringlog" resize "$ring" 400
check "and stays as it was" holds "$ring" one two three
read_only
check "a read-only file system takes no line" fails 1 "ringlog: $ring: Read-only file system" put "$ring" four
check "and shows the old ones" holds "$ring" one two three

finish
