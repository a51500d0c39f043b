# shellcheck shell=sh
# What a phase script may use. POSIX sh; sourced by run.sh's child before `set -ex`.

# Prints one sentinel line; tracing is switched off so that the console shows it once.
vmtasks_say() { printf '\n::vmtasks:%s:%s\n' "$VMTASKS_TOKEN" "$*"; }

# step TITLE: what follows belongs to this step.
step() {
    { set +x; } 2>/dev/null
    { printf '%s\n' "$*" >"$VMTASKS_STEP"; } 2>/dev/null || :
    vmtasks_say "step $*"
    set -x
}

# say TEXT: a line for the reader of the log.
say() {
    { set +x; } 2>/dev/null
    printf '%s\n' "$*"
    set -x
}

# hostkey FILE.pub: tells the host which key this guest's SSH server will show.
hostkey() {
    { set +x; } 2>/dev/null
    vmtasks_key=
    read -r vmtasks_type vmtasks_key _ <"$1" || :
    [ -n "$vmtasks_key" ] || fail "there is no host key in $1"
    vmtasks_say "hostkey $vmtasks_type $vmtasks_key"
    set -x
}

# observe NAME COMMAND...: puts into the log what a command says, for a report. That it fails is noted, and ends nothing.
observe() {
    { set +x; } 2>/dev/null
    vmtasks_what=$1
    shift
    { "$@" 2>&1 || printf '(status %s)\n' "$?"; } | while IFS= read -r vmtasks_line || [ -n "$vmtasks_line" ]; do
        printf 'observed %s: %s\n' "$vmtasks_what" "$vmtasks_line"
    done
    set -x
}

# fail TEXT: ends the phase.
fail() {
    { set +x; } 2>/dev/null
    printf 'FAILED: %s\n' "$*"
    exit 1
}

# retry TIMES COMMAND...: runs it until it succeeds, with a growing pause.
retry() {
    { set +x; } 2>/dev/null
    vmtasks_left=$1
    vmtasks_pause=1
    shift
    until vmtasks_try "$@"; do
        vmtasks_left=$((vmtasks_left - 1))
        if [ "$vmtasks_left" -le 0 ]; then
            set -x
            return 1
        fi
        sleep "$vmtasks_pause"
        vmtasks_pause=$((vmtasks_pause * 2))
    done
    set -x
}

vmtasks_try() {
    printf '+ : retry %s\n' "$*"
    "$@"
}
