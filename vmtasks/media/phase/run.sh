#!/bin/sh
# Runs the phase script and tells the host how it went, whatever happens; then powers the guest off.
# Generated files beside it: phase.sh (the script), lib.sh (what it may use), token, poweroff.

PATH=/sbin:/bin:/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin
export PATH
VMTASKS_MEDIA=$(cd "$(dirname "$0")" && pwd)
VMTASKS_TOKEN=$(cat "$VMTASKS_MEDIA/token")
VMTASKS_STEP=${TMPDIR:-/tmp}/vmtasks.step
export VMTASKS_MEDIA VMTASKS_TOKEN VMTASKS_STEP
# In a subshell, because a redirection that fails ends a shell when it belongs to a special built-in command.
(: >"$VMTASKS_STEP") 2>/dev/null || VMTASKS_STEP=/dev/null

# Each line begins with a line break, because the kernel may have left one unfinished. The verdict is said three
# times: a message of the kernel's can fall into the middle of one.
say() { printf '\n::vmtasks:%s:%s\n' "$VMTASKS_TOKEN" "$*" >/dev/console; }

# shellcheck disable=SC2317,SC2329 # the traps below call it
verdict() {
    status=$?
    trap '' EXIT HUP INT QUIT PIPE TERM
    case $1 in '') ;; *) status=$1 ;; esac
    step=$(cat "$VMTASKS_STEP" 2>/dev/null)
    for _ in 1 2 3; do say "exit $status $step"; done
    sync
    # Setting a terminal waits until what was written to it has been sent.
    stty </dev/console >/dev/null 2>&1 && stty "$(stty -g </dev/console)" </dev/console >/dev/null 2>&1
    sync
    # The verdict is out: whoever powers off may end this shell, and what it starts. systemd waits 90 seconds for a
    # process that ignores SIGTERM. The command itself is not cut short.
    ended=
    trap 'ended=yes' TERM
    eval "$(cat "$VMTASKS_MEDIA/poweroff")"
    trap - TERM
    [ -z "$ended" ] || exit "$status"
    sleep 120
    say "poweroff failed"
}
trap 'verdict ""' EXIT
trap 'verdict 129' HUP
trap 'verdict 130' INT
trap 'verdict 131' QUIT
trap 'verdict 141' PIPE
trap 'verdict 143' TERM

cd / || exit 1
say begin
# A child, so that neither a syntax error nor an exit in the script can get past the verdict. The trace goes to the
# console with the output: the last command is in the log when one fails.
# shellcheck disable=SC2016 # expanded by the child
/bin/sh -c 'PS4="+ \$LINENO: "; . "$1/lib.sh"; set -ex; . "$1/phase.sh"' phase "$VMTASKS_MEDIA" \
    </dev/null >/dev/console 2>&1
exit $?
