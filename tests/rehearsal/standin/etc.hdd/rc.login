#!/bin/sh
# A login prompt on the terminal that is the console, once start-up has ended, if /etc/ttys wants one there.
# shellcheck disable=SC1091
. /usr/libexec/standin/common
until [ -e /run/booted ]; do
    sleep 0.2
done
read -r consoles </sys/class/tty/console/active
tty=${consoles##* }
case $tty in
    ttyS0)
        grep -Eq '^ttyd0[[:space:]].*[[:space:]](on|ifconsole|onifconsole)([[:space:]]|$)' /etc/ttys || exec sleep 1000000
        ;;
    *) tty=tty1 ;;
esac
exec getty -L 115200 "$tty" vt100
