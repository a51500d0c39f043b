#!/bin/sh
# Lets the key in authorized_keys, beside this file, log in as a user of this system.
#
#     sh key.sh [-r ROOT] [USER]
#
# USER is by default the one that the host logs in as (in the file `user`). ROOT: where an installed system is mounted,
# for use on the installer's live system. It may run twice.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=
while getopts r: option; do
    case $option in
        r) root=${OPTARG%/} ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
user=${1:-$(cat "$here/user")}

fail() {
    echo "key.sh: $*" >&2
    exit 1
}

[ -r "$root/etc/passwd" ] || fail "there is no system in ${root:-/}: $root/etc/passwd cannot be read"
entry=
while IFS= read -r line; do
    case $line in "$user":*) entry=$line ;; esac
done <"$root/etc/passwd"
[ -n "$entry" ] || fail "there is no user $user in $root/etc/passwd"

old_ifs=$IFS
IFS=:
set -f
# shellcheck disable=SC2086 # name, password, uid, gid, comment, home and shell
set -- $entry
set +f
IFS=$old_ifs
case $# in 6 | 7) ;; *) fail "the line of $user in $root/etc/passwd cannot be understood: $entry" ;; esac
owner=$3:$4
home=$root$6

# A live system may have a folder of root's that does not come from the disk; a user's home must be there.
[ -d "$home" ] || fail "$user has no home: $home is not there"
key=$(cat "$here/authorized_keys")
file=$home/.ssh/authorized_keys
umask 077
mkdir -p "$home/.ssh"
if [ ! -e "$file" ] || ! grep -qxF "$key" "$file"; then
    # A last line without its line break must not swallow the key.
    [ ! -s "$file" ] || [ -z "$(tail -c 1 "$file")" ] || echo >>"$file"
    printf '%s\n' "$key" >>"$file"
fi
chmod 0700 "$home/.ssh"
chmod 0600 "$file"
chown -R "$owner" "$home/.ssh"
echo "key.sh: the key may log in as $user ($file)"
