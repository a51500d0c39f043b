#!/bin/sh
# As run.sh does on the console, but over SSH, on a machine that goes on running: runs the phase script and says on its
# output how it went. VMTASKS_MEDIA and VMTASKS_TOKEN come from the host; phase.sh and lib.sh are beside it.

PATH=/sbin:/bin:/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin
export PATH
VMTASKS_SSH=yes
VMTASKS_STEP=$VMTASKS_MEDIA/step
export VMTASKS_SSH VMTASKS_STEP

say() { printf '\n::vmtasks:%s:%s\n' "$VMTASKS_TOKEN" "$*"; }

# shellcheck disable=SC2317,SC2329 # the traps below call it
verdict() {
    status=$?
    trap '' EXIT HUP INT QUIT PIPE TERM
    case $1 in '') ;; *) status=$1 ;; esac
    say "exit $status $(cat "$VMTASKS_STEP" 2>/dev/null)"
    sync
    exit "$status"
}
trap 'verdict ""' EXIT
trap 'verdict 129' HUP
trap 'verdict 130' INT
trap 'verdict 131' QUIT
trap 'verdict 141' PIPE
trap 'verdict 143' TERM

cd / || exit 1
say begin
# shellcheck disable=SC2016 # expanded by the child
/bin/sh -c 'PS4="+ \$LINENO: "; . "$1/lib.sh"; set -ex; . "$1/phase.sh"' phase "$VMTASKS_MEDIA" </dev/null 2>&1
exit $?
