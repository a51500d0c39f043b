"""What a person does at a guest's console: the manual way from the installer to a snapshot, and a look at a phase."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from terminal import Terminal, on_terminal

from conftest import Project

pytestmark = pytest.mark.timeout(900)

CTRL_A_X = "\x01x"
PHASE_3 = "phases/tiny/3-provision.sh.j2"
GUEST_3 = 'name = "3-provision"\nboot = "disk"\ncds = ["phase"]\ntimeout_s = 60'

DISK = [
    "d=$(readlink -f /dev/da0)",
    r"printf 'o\nn\np\n1\n2048\n\na\n1\nw\n' | fdisk $d >/dev/null 2>&1; test -b ${d}1",
    "dd if=/usr/lib/EXTLINUX/mbr.bin of=$d bs=440 count=1 conv=notrunc",
    "mkfs.ext4 -q -F -L root -O '^64bit,^metadata_csum,uninit_bg' ${d}1",
    "mkdir /tmp/t /tmp/s && mount -t ext4 -o noinit_itable ${d}1 /tmp/t && mount -t iso9660 -o ro /dev/cd0 /tmp/s",
]
SYSTEM = [
    "cp -a /tmp/s/. /tmp/t/ && umount /tmp/s && chmod 755 /tmp/t && rm -rf /tmp/t/boot/isolinux",
    "echo 'LABEL=root / ext4 noatime 0 1' >/tmp/t/etc/fstab",
    r"printf 'hostname=byhand\ndhcp_interface=eth0\nsshd=YES\n' >/tmp/t/etc/rc.conf",
    "mkdir -p /tmp/t/boot/extlinux",
    "cd /tmp/t/boot/extlinux",
    r"printf 'SERIAL 0 115200\nDEFAULT disk\nLABEL disk\nKERNEL /boot/kernel\nINITRD /boot/initrd.gz\n' >extlinux.conf",
    "echo 'APPEND root=LABEL=root console=tty0 console=ttyS0,115200' >>extlinux.conf && cd /",
    "extlinux --install /tmp/t/boot/extlinux",
    "ssh-keygen -q -t ed25519 -N '' -f /tmp/t/etc/ssh/ssh_host_ed25519_key",
]
"""What phase 1 does, in the words of somebody at the console; root keeps having no password there."""


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Iterator[Project]:
    """A project whose machine `hand` is installed by hand, on the store that has the installer."""
    made = Project(tmp_path_factory.mktemp("byhand") / "project", store)
    made.name = "hand"
    yield made
    made.clean_up()


def power_off(terminal: Terminal) -> str:
    terminal.type("poweroff\r")
    return terminal.end().good()


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_the_manual_way(hand: Project) -> None:
    """Installer, key from its CD, start, provision, snapshot; then the cycle of an updated provisioning."""
    with on_terminal(hand, "name=hand", "install") as terminal:
        assert "9, set console=comconsole, boot" in terminal.wait_for("To its loader, type: .*")
        terminal.loader()
        terminal.log_in()
        for line in (*DISK, *SYSTEM):
            terminal.run(line)
        terminal.run("mount -o ro /dev/cd1 /mnt && ls /mnt && umount /mnt && umount /tmp/t")
        assert not re.search(r"pfi\.conf", terminal.seen)
        assert "doit start" in power_off(terminal)
    with on_terminal(hand, "name=hand", "install", "--disk") as terminal:
        terminal.log_in()
        terminal.run("mount -o ro /dev/cd0 /mnt && sh /mnt/key.sh && sh /mnt/key.sh")
        terminal.run("test $(wc -l </root/.ssh/authorized_keys) = 1")
        terminal.run("sed -i 's/^root::/root:*:/' /etc/shadow")
        power_off(terminal)
    hand.doit("name=hand", "memory=300M", "cpus=2", "cache=unsafe", "start").good()
    assert hand.boots() == [], "what was installed by hand needs no phase"
    assert hand.ssh("id -un; nproc").stdout == "root\n2\n"
    assert 200_000 < int(hand.ssh("awk '/^MemTotal/ { print $2 }' /proc/meminfo").stdout) < 300 << 10
    provision(hand)
    update(hand)


def provision(hand: Project) -> None:
    """The phases that packages and users come from, over SSH; after them the login is the guest's own user's."""
    assert "phase 2-packages: done" in hand.doit("name=hand", "provision", "--phase", "2").good()
    output = hand.doit("name=hand", "provision").good()
    assert "create the user" in output
    assert "logins are as dev from now on" in output
    assert hand.ssh("id -un; doas id -u").stdout == "dev\n0\n"
    output = hand.doit("name=hand", "test:unit").good()
    assert "14 passed" in output
    assert "nothing has changed" in hand.doit("name=hand", "test:unit").good()
    hand.doit("name=hand", "stop").good()
    hand.doit("name=hand", "snapshot", "--name", "byhand").good()
    assert hand.boots() == []


def update(hand: Project) -> None:
    """Provisioning that has changed: restore, start, provision, stop, snapshot."""
    hand.doit("name=hand", "restore", "--name", "byhand").good()
    hand.append(PHASE_3, "\nstep 'more'\nid -u >/etc/more\n")
    hand.doit("name=hand", "start").good()
    assert hand.ssh("cat /etc/more").returncode == 1
    assert "more" in hand.doit("name=hand", "provision").good()
    assert hand.ssh("cat /etc/more").stdout == "0\n"
    assert hand.ssh("ls -d /tmp/vmtasks.*").returncode != 0, "nothing is left of the script"
    assert "changed: image" in hand.doit("name=hand", "info", "test:unit").output, "it is another system now"
    failures(hand)
    hand.doit("name=hand", "stop").good()
    hand.doit("name=hand", "snapshot", "--name", "more").good()
    assert hand.boots() == []


def failures(hand: Project) -> None:
    """A script that fails says where; one that hangs is ended in the guest."""
    good = (hand.root / PHASE_3).read_text()
    hand.append(PHASE_3, "step 'break it'\nls /etc/none-such\n")
    output = hand.doit("name=hand", "provision").bad()
    assert re.search(r"its script exited with \d+ \((line \d+: )?ls /etc/none-such\) at step 'break it'", output)
    assert "provision-3-provision.log" in output
    assert "No such file" in output
    (hand.root / PHASE_3).write_text("step 'sleep'\nsleep 4321\n")
    hand.edit("phases/tiny/guest.toml", GUEST_3, GUEST_3.replace("60", "1"))
    output = hand.doit("name=hand", "provision").bad()
    assert "the script did not end within" in output
    assert "at step 'sleep'" in output
    assert hand.ssh("ps | grep '[s]leep 4321'").returncode == 1
    hand.edit("phases/tiny/guest.toml", GUEST_3.replace("60", "1"), GUEST_3)
    (hand.root / PHASE_3).write_text(good)
    assert "has phases 1 to 3" in hand.doit("name=hand", "provision", "--phase", "9").bad(2)


@pytest.mark.exhaustive
def test_a_look_at_what_a_phase_starts_from(project: Project) -> None:
    """The disk as it would start, and from the installer's live system; nothing is changed and nothing is left."""
    project.doit("phase:2").good()
    image = project.image(2)
    before = (image.stat().st_mtime_ns, image.stat().st_size)
    with on_terminal(project, "look:3") as terminal:
        terminal.wait_for("login: $")
        assert len(project.qemus()) == 1
        terminal.type(CTRL_A_X)
        terminal.end().good()
    with on_terminal(project, "look:2", "--live") as terminal:
        terminal.loader()
        terminal.log_in()
        terminal.run("mount -t ext4 $(readlink -f /dev/da0)1 /mnt && cat /mnt/etc/rc.conf && rm -rf /mnt/etc", 30)
        assert "sshd=NO" in terminal.seen
        terminal.type(CTRL_A_X)
        terminal.end().good()
    assert (image.stat().st_mtime_ns, image.stat().st_size) == before
    assert project.boots() == []
    assert project.qemus() == []
    assert not list(project.tiny.glob("look-*"))


def test_a_person_must_be_there(project: Project) -> None:
    for words in (["install"], ["look:1"]):
        output = project.doit(*words).bad()
        assert "this is no terminal" in output
        assert "--display" in output
    output = project.doit("look:1", "--display", env={"DISPLAY": "", "WAYLAND_DISPLAY": ""}).bad()
    assert re.search("this QEMU can open no window|there is no screen for a window", output)
    assert "serial console" in output
    assert project.qemus() == []
