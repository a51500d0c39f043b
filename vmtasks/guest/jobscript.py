"""PURE: the POSIX sh scripts that start, follow, show and end a job in a guest. See job.py for what a job is.

The runner holds the fifo `alive` open while it lives: a reader of the fifo waits without polling for the runner's end,
whatever its cause. A process belongs to the job only if its command line holds the job's id, which cannot be guessed.
No other process is ever signalled.
"""

import shlex

from vmtasks.guest import ssh

JOBS = ".vmtasks/jobs"
"""Below the login user's home, where each command starts: on disk, so that logs survive a reboot."""

STARTED = b"::vmtasks:started\n"
EXISTS = "::vmtasks:exists"
MARK = "::vmtasks:rest"

PARTS = """
mine() {
    case $1 in '' | *[!0-9]* | $$) return 1 ;; esac
    if [ -r /proc/self/cmdline ]; then grep -q "$2" /proc/$1/cmdline 2>/dev/null
    else ps -p $1 -o args= 2>/dev/null | grep -q "$2"
    fi
}
facts() {
    ls -lnd "$@" 2>/dev/null | while read -r mode _ _ _ size rest; do
        file=${rest%% -> *} file=${file##* } value=
        case $mode$file in
        -*log) file=size value=$size ;;
        -*) [ "$size" -gt 1000 ] || read -r value <"$file" ;;
        esac
        printf '%s %s\\n' "$file" "$value"
    done
}
value() { facts "$1" | { read -r _ value; echo "$value"; }; }
plain() { [ -f "$1" ] && [ ! -L "$1" ]; }
"""
"""Shared functions. Files in a job's folder may be damaged or forged: only the first line of a small regular file is
read, and the size of the log. facts() prints for each existing file its name and that value, if any."""

ENTER = """
[ ! -L @JOBS@/@ID@ ] && cd @JOBS@/@ID@ 2>/dev/null || exit 4
"""

START = """
keep=$(umask); umask 077
mkdir -p @JOBS@ && chmod 700 .vmtasks @JOBS@ || exit 1
if ! mkdir @JOBS@/@ID@ 2>/dev/null; then
    [ -d @JOBS@/@ID@ ] && echo @EXISTS@ && exit 0
    mkdir @JOBS@/@ID@; exit 1
fi
cd @JOBS@/@ID@ || exit 1
cat >command
if [ "$(wc -c <command)" -ne @BYTES@ ]; then cd ..; rm -rf @ID@; exit 90; fi
printf '%s\n' @TITLE@ >title; printf '%s\n' @USER@ >user; printf '%s\n' @BOOT@ >boot; date +%s >started
: >log; @SPLIT@
home=$(cd ../../.. && pwd); here=$home/@JOBS@/@ID@
mkfifo alive 2>/dev/null && exec 9<>alive
echo $$ >pid
echo ::vmtasks:started
exec </dev/null >/dev/null 2>why
trap : HUP INT QUIT TERM PIPE
if command -v setsid >/dev/null; then setsid=setsid
else setsid=; if kill -0 -$$ 2>/dev/null; then echo $$ >group; fi
fi
umask $keep
cd "$home"
{ $setsid /bin/sh -c '
    echo $$ >"$1/leader"; [ -z "$2" ] || echo $$ >"$1/group"
    exec >>"$1/log" @STDERR@ 9>&-; exec /bin/sh "$1/command"' sh "$here" "$setsid"; s=$?; } 2>"$here/why"
umask 077
cd "$here"
if [ $s -gt 128 ] && [ -s why ]; then how="signal $((s - 128))"; else how="exit $s"; fi
chmod 700 .
rm -rf status.new; [ -f status ] || rm -rf status
echo "$how $(date +%s)" >status.new && mv -f status.new status
rm -rf why
"""
"""The shell that starts a job becomes its runner. It does not use `&`, because a command started so ignores SIGINT.
The command runs in the foreground of the runner, in a process group of its own where setsid exists, else in the
runner's. A shell reports death by a signal, unlike an exit status above 128, on its stderr, so the command gets another
stderr. A `status` that already exists is not the runner's and is removed."""

FOLLOW = f"""
{ENTER}
runner() {{ mine "$(value pid)" @ID@; }}
runner || exit 0
tails=
if plain log; then tail -c +@OUT@ -f log & tails=$!; fi
if plain err; then tail -c +@ERR@ -f err >&2 & tails="$tails $!"; fi
if [ -p alive ]; then exec 8<>alive 7<alive 8>&-; read -r _ <&7; fi
while runner; do sleep 1; done
[ -z "$tails" ] || kill $tails 2>/dev/null
exit 0
"""
"""Opening a fifo for reading and writing does not block; afterwards only the runner holds it for writing. If the fifo
is not the runner's, or cannot be made, the runner's process is polled."""

READ = f"""
{ENTER}
! plain log || tail -c +@OUT@ log
! plain err || tail -c +@ERR@ err >&2
exit 0
"""

SHOW = """
for folder in @WHICH@; do
    id=${folder##*/}
    case $id in *[!0-9a-f]*) continue ;; ????????????????) ;; *) continue ;; esac
    [ ! -L $folder ] && cd $folder 2>/dev/null || continue
    echo "job $id"
    ! mine "$(value pid)" $id || echo "alive"
    facts status started user title boot pid group cancelled log
    cd ../../..
done
"""
"""Checks the runner before the status, because a runner writes the status last."""

REST = f"{{ {SHOW} }} >&2; echo @MARK@ >&2\n{READ}"
"""A job's state, read first, and its output from some byte on, in one round trip."""

CANCEL = f"""
{ENTER}
pid=$(value pid) leader=$(value leader)
mine "$pid" @ID@ || mine "$leader" @ID@ || {{ [ ! -e status ] || exit 0; exit 3; }}
case @GROUP@ in [01]) exit 3 ;; "$pid" | "$leader") ;; *) exit 3 ;; esac
rm -rf cancelled; echo >cancelled
signal() {{
    kill -$1 -@GROUP@ 2>/dev/null
    @ASUSER@
}}
pause() {{ sleep 0.2 2>/dev/null || sleep 1; }}
signal TERM
n=0; while mine "$pid" @ID@ && [ $n -lt @TRIES@ ]; do pause; n=$((n + 1)); done
signal KILL
n=0; while mine "$pid" @ID@ && [ $n -lt 25 ]; do pause; n=$((n + 1)); done
if [ ! -e status ] && ! mine "$pid" @ID@; then
    rm -rf status.end
    echo "signal 9 $(date +%s)" >status.end && mv -f status.end status
fi
exit 0
"""
"""KILL follows TERM at once when the command has ended: its children may ignore TERM. The kernel does not reuse the
number of a group that has members. A group that is neither the runner's nor the leader's is not the job's."""

REMOVE = """
cd @JOBS@ 2>/dev/null || exit 0
[ ! -L @ID@ ] && cd @ID@ 2>/dev/null || { rm -rf @ID@; exit 0; }
! mine "$(value pid)" @ID@ || exit 3
chmod 700 .; cd ..
rm -rf @ID@
"""


def fill(text: str, **values: str | int) -> str:
    """Fill in a script's @NAMES@, and prepend PARTS if it uses them."""
    for name, value in {"JOBS": JOBS, "EXISTS": EXISTS, "MARK": MARK, **values}.items():
        text = text.replace(f"@{name}@", str(value))
    return PARTS + text if any(f"{part} " in text for part in ("mine", "value", "plain")) else text


def start(job: str, text: bytes, *, title: str, user: str, boot: str, split: bool) -> str:
    """The script that starts a job. Its stdin is the command."""
    return fill(
        START,
        ID=job,
        BYTES=len(text),
        TITLE=shlex.quote(title),
        USER=shlex.quote(user),
        BOOT=shlex.quote(boot),
        SPLIT=": >err" if split else ":",
        STDERR='2>>"$1/err"' if split else "2>&1",
    )


def cancel(job: str, group: int, user: str, grace_s: float) -> str:
    """The script that ends a job's process group, even if it runs as another user."""
    lines = [
        f'[ "$1" != {name} ] || ( {ssh.become(user, f"kill -{name} -{group}")} ) 2>/dev/null'
        for name in ("TERM", "KILL")
    ]
    as_user = "\n".join(lines) if user else ":"
    return fill(CANCEL, ID=job, GROUP=group, TRIES=max(1, round(grace_s * 5)), ASUSER=as_user)
