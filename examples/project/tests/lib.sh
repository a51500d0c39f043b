# shellcheck shell=sh
# TAP in POSIX sh. A test file sets `planned` and sources this file; `check` makes one test point of each command.

LC_ALL=C
export LC_ALL
ringlog=$PWD/build/ringlog
work=$(mktemp -d "${TMPDIR:-/tmp}/ringlog.XXXXXX") || exit 1
number=0
failed=0

cleanup() { rm -rf "$work"; }
trap 'cleanup' EXIT
trap 'exit 1' HUP INT TERM

echo "1..${planned:?}"

# check TITLE COMMAND...: the test passes when the command does; what a failing one printed is its diagnostics.
check() {
    title=$1
    shift
    number=$((number + 1))
    if "$@" >"$work/out" 2>&1; then
        echo "ok $number - $title"
    else
        echo "not ok $number - $title"
        echo "#   Failed: $*"
        sed 's/^/#   /' "$work/out"
        failed=$((failed + 1))
    fi
}

# fails STATUS TEXT COMMAND...: the command must exit with this status and this line on standard error.
fails() {
    wanted=$1
    text=$2
    shift 2
    "$@" >/dev/null 2>"$work/err"
    got=$?
    [ "$got" -eq "$wanted" ] && grep -Fqx -e "$text" "$work/err" && return 0
    echo "wanted status $wanted and: $text"
    echo "got status $got and: $(cat "$work/err")"
    return 1
}

# holds RING LINE...: the ring shows these lines and no others.
holds() {
    ring=$1
    shift
    [ $# -eq 0 ] || printf '%s\n' "$@" >"$work/wanted"
    [ $# -ne 0 ] || : >"$work/wanted"
    "$ringlog" show "$ring" >"$work/got" && diff "$work/wanted" "$work/got"
}

# put RING LINE...: append the lines.
put() {
    ring=$1
    shift
    printf '%s\n' "$@" | "$ringlog" append "$ring"
}

finish() {
    [ "$failed" -eq 0 ]
    exit
}
