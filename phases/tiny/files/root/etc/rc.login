#!/bin/sh
# A login prompt on the terminal that is the console, once start-up has ended.
until [ -e /run/booted ]; do
    sleep 0.2
done
read -r consoles </sys/class/tty/console/active
tty=${consoles##* }
[ "$tty" != tty0 ] || tty=tty1
exec getty -L 115200 "$tty" vt100
