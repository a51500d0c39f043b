"""PURE: the POSIX sh scripts that start, follow, show and end a job in a guest. See job.py for what a job is.

The runner holds the fifo `alive` open as long as it lives: who reads from it waits without polling, and learns of the
runner's end whatever ended it. A process is taken for the job's only if its command line holds the job's id, which
cannot be guessed; nothing else is ever signalled.
"""

import shlex

from vmtasks.guest import ssh

JOBS = ".vmtasks/jobs"
"""Below the login user's home, where each command begins: on disk, so that logs outlive a reboot."""

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
"""What the scripts share. What stands in a job's folder may be damaged, or another's: only the first line of a small
plain file is read, and of the log the size. facts() prints of each file that is there its name and this, if any."""

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
"""The shell that is asked to start a job becomes its runner: no `&`, with which a shell starts a command that ignores
SIGINT. The command is in the foreground of the runner, in a group of its own where there is setsid, else in the
runner's own. A shell tells death by a signal from a status above 128 only by what it says about it on its stderr, which
is therefore not the command's. A status that stands there already is not the runner's: it goes."""

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
"""Both ways of opening a fifo at once do not block; after that only the runner holds it for writing. Where it is not
the runner's, or cannot be made, its process is looked for."""

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
"""Whether its runner lives is asked before its status, which a runner that ends writes as the last thing it does."""

REST = f"{{ {SHOW} }} >&2; echo @MARK@ >&2\n{READ}"
"""How a job stands, asked first, and what it has written from some byte on: in one go."""

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
"""KILL follows TERM at once when the command has ended: what it started may ignore TERM. A group's number is not used
again as long as it has members; one that is neither the runner's nor the leader's is not the job's."""

REMOVE = """
cd @JOBS@ 2>/dev/null || exit 0
[ ! -L @ID@ ] && cd @ID@ 2>/dev/null || { rm -rf @ID@; exit 0; }
! mine "$(value pid)" @ID@ || exit 3
chmod 700 .; cd ..
rm -rf @ID@
"""


def fill(text: str, **values: str | int) -> str:
    """A script with its places filled in; what it needs of PARTS before it."""
    for name, value in {"JOBS": JOBS, "EXISTS": EXISTS, "MARK": MARK, **values}.items():
        text = text.replace(f"@{name}@", str(value))
    return PARTS + text if any(f"{part} " in text for part in ("mine", "value", "plain")) else text


def start(job: str, text: bytes, *, title: str, user: str, boot: str, split: bool) -> str:
    """The script that starts a job whose command comes on its stdin."""
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
    """The script that ends a job's process group, also where it runs as another user."""
    lines = [
        f'[ "$1" != {name} ] || ( {ssh.become(user, f"kill -{name} -{group}")} ) 2>/dev/null'
        for name in ("TERM", "KILL")
    ]
    as_user = "\n".join(lines) if user else ":"
    return fill(CANCEL, ID=job, GROUP=group, TRIES=max(1, round(grace_s * 5)), ASUSER=as_user)
