#!/bin/sh
# What ringlog promises to any user: make test
cd "$(dirname "$0")/.." || exit 1
planned=14
# shellcheck source-path=SCRIPTDIR source=lib.sh
. tests/lib.sh
ring=$work/a.ring

writers() {
    "$ringlog" create "$work/many.ring" 200 || return 1
    for writer in 1 2 3 4; do
        for line in 1 2 3 4 5 6 7 8 9 10; do put "$work/many.ring" "$writer.$line" || exit 1; done &
    done
    wait
    "$ringlog" show "$work/many.ring" | sort -u >"$work/lines"
    [ "$(wc -l <"$work/lines")" -eq 40 ]
}

same_size() { [ "$(wc -c <"$ring")" -eq $((4 * 128)) ]; }

longest=$(printf '%0127d' 7)

check "makes a ring" "$ringlog" create "$ring" 3
check "a new ring is empty" holds "$ring"
check "does not overwrite a file" fails 1 "ringlog: $ring: exists" "$ringlog" create "$ring" 3
check "appends lines" put "$ring" one two
check "shows them in order" holds "$ring" one two
put "$ring" three four
check "the newest line takes the place of the oldest" holds "$ring" two three four
check "the file does not grow" same_size
check "grows on demand" "$ringlog" resize "$ring" 5
put "$ring" five
check "and keeps its lines" holds "$ring" two three four five
"$ringlog" resize "$ring" 2
check "shrinks to its newest lines" holds "$ring" four five
check "takes a line of 127 bytes" put "$ring" "$longest"
check "refuses a longer one" fails 1 "ringlog: standard input: line longer than 127 bytes" put "$ring" "x$longest"
cp "$ring" "$work/cut.ring"
dd if="$ring" of="$work/cut.ring" bs=128 count=2 2>/dev/null
check "tells a damaged ring" fails 1 "ringlog: $work/cut.ring: not a ring, or damaged" "$ringlog" show "$work/cut.ring"
check "four writers at once lose nothing" writers

finish
