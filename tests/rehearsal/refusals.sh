# shellcheck shell=sh
# What the stand-ins must refuse, because DragonFly's tools do. It takes the place of phase 2 in one test.

refused() {
    ! "$@" || fail "accepted: $*"
}

step "disks and file systems"
mkdir -p /tmp/x
refused fdisk -Q da0
refused fdisk -IB da0s1
refused fdisk -IB da7
refused disklabel64 -r -w
refused disklabel64 -r -w da0s1 standard
refused disklabel64 -R da0s1 /tmp/nothing
echo 'a: 1g 0 4.2BSD' >/tmp/label
refused disklabel64 -R -r da0s1 /tmp/label
refused newfs -Z /dev/da0s1b
refused newfs /dev/da0s1q
refused newfs /dev/da0s1a
refused newfs_hammer2 -Z /dev/da0s1b
refused newfs_hammer2 /dev/da0s1d
refused newfs_hammer2 -L ROOT
refused mount -t ufs /dev/da0s1b /tmp/x
refused mount_hammer2 /dev/da0s1b@ROOT /tmp/x
refused mount_hammer2 /dev/da0s1d@DATA /tmp/x
refused mount_hammer2 /dev/da0s1d@ROOT /tmp/x
refused mount_cd9660 /dev/cd7 /tmp/x
refused mount_cd9660 /dev/cd1 /tmp/not-there
refused umount /tmp/x
refused cpdup -z /etc /tmp/x
refused cpdup /not-there /tmp/x
refused cpdup /etc
refused dd if=/dev/zero of=/dev/null count=1 status=progress

step "accounts"
refused pwd_mkdb
refused pwd_mkdb -p -d /etc /tmp/nothing
echo 'half:an:entry' >/tmp/master.passwd
refused pwd_mkdb -C /tmp/master.passwd
refused pw useradd root -m
refused pw useradd somebody -w hidden
refused pw useradd somebody -G nosuchgroup
refused pw usermod nobody-there -s /bin/sh
refused pw usermod root -Z
refused su -l nobody-there -c true

step "packages"
refused pkg install no-such-package
refused pkg install -Z bash
refused pkg frobnicate
refused pkg install bash
refused pkg query %n-%v bash
refused bash -c true
refused go version
refused wget --version

step "other systems' options and programs"
refused cp --archive /etc/hosts /tmp/x
refused ls --color /
refused mkdir --parents /tmp/x/y
refused rm --recursive /tmp/x
refused sed -i s/a/b/ /etc/hosts
refused ln -T /etc/hosts /tmp/x/hosts
refused install -t /tmp/x /etc/hosts
refused uname -o
refused sysctl -n no.such.variable
refused service nosuch start
refused ip address
refused lsblk
refused apt-get update
refused systemctl status
refused nproc
refused tac /etc/hosts
