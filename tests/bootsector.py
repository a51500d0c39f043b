r"""Boot sectors from Python, without an assembler: guests for tests that need QEMU and no operating system.

    image = sector(say("hello\r\n"), ask("OK ", "boot"), power_off())

is a disk image that SeaBIOS boots (`-machine pc`, the disk or CD on any bus it knows) in about 0.2 s, talking on COM1.
An action is machine code that runs wherever it is put, so that actions are joined with +, kept in variables and
repeated. What is in one sector stays in one; longer programs take more sectors, up to 32 KiB.
"""

import io

import pycdlib

SECTOR = 512
BASE = 0x7C00
"""Where the BIOS puts the first sector."""
CONTENT_MAX = 0x8000
"""Bytes of actions: calls and jumps are 16 bits wide, and so is the segment that everything lives in."""

LISTING: tuple[tuple[str, str], ...] = (
    ("", "bits 16"),
    ("", "org 0x7c00"),
    # The BIOS leaves the boot drive in dl. Segments become 0; the stack grows down from the sector.
    ("fa", "cli"),
    ("31 c0", "xor ax, ax"),
    ("8e d8", "mov ds, ax"),
    ("8e c0", "mov es, ax"),
    ("8e d0", "mov ss, ax"),
    ("bc 00 7c", "mov sp, 0x7c00"),
    ("fb", "sti"),
    ("fc", "cld"),
    # As a CD (drives from 0xe0) the BIOS has loaded everything; from a disk the sectors after the first are missing.
    ("80 fa e0", "cmp dl, 0xe0"),
    ("0f 83 cb 00", "jae loaded"),
    ("83 3e 33 7c 00", "cmp word [dap_count], 0"),
    ("0f 84 c2 00", "je loaded"),
    ("be 31 7c", "mov si, dap"),
    ("b4 42", "mov ah, 0x42"),
    ("cd 13", "int 0x13"),
    ("0f 83 b7 00", "jnc loaded"),
    ("be 41 7c", "mov si, unreadable"),
    ("e8 2b 00", "call puts"),
    ("fa", "cli"),
    ("f4", "hlt"),
    ("", "dap:"),
    ("10 00", "db 0x10, 0"),
    ("", "dap_count:"),
    ("00 00", "dw 0"),
    ("00 7e 00 00", "dw 0x7e00, 0"),
    ("01 00 00 00 00 00 00 00", "dq 1"),
    ("", "unreadable:"),
    ("73 65 63 74 6f 72 3a 3f 00", 'db "sector:?", 0'),
    # putc: al to COM1 once it is ready to send. Keeps all registers.
    ("", "putc:"),
    ("52", "push dx"),
    ("50", "push ax"),
    ("ba fd 03", "mov dx, 0x3fd"),
    ("", "putc_wait:"),
    ("ec", "in al, dx"),
    ("a8 20", "test al, 0x20"),
    ("74 fb", "jz putc_wait"),
    ("58", "pop ax"),
    ("b2 f8", "mov dl, 0xf8"),
    ("ee", "out dx, al"),
    ("5a", "pop dx"),
    ("c3", "ret"),
    # puts: the text at si, up to a zero byte.
    ("", "puts:"),
    ("ac", "lodsb"),
    ("84 c0", "test al, al"),
    ("74 05", "jz puts_end"),
    ("e8 e8 ff", "call putc"),
    ("eb f6", "jmp puts"),
    ("", "puts_end:"),
    ("c3", "ret"),
    # getc: waits for a byte from COM1, into al.
    ("", "getc:"),
    ("ba fd 03", "mov dx, 0x3fd"),
    ("", "getc_wait:"),
    ("ec", "in al, dx"),
    ("a8 01", "test al, 0x01"),
    ("74 fb", "jz getc_wait"),
    ("b2 f8", "mov dl, 0xf8"),
    ("ec", "in al, dx"),
    ("c3", "ret"),
    # getline: a line from COM1, echoed, into the buffer at 0x600, ended with a zero byte; CR and LF both end it.
    ("", "getline:"),
    ("bf 00 06", "mov di, 0x600"),
    ("", "getline_next:"),
    ("e8 ee ff", "call getc"),
    ("3c 0d", "cmp al, 0x0d"),
    ("74 10", "je getline_end"),
    ("3c 0a", "cmp al, 0x0a"),
    ("74 0c", "je getline_end"),
    ("e8 c8 ff", "call putc"),
    ("81 ff ff 06", "cmp di, 0x6ff"),
    ("73 ec", "jae getline_next"),
    ("aa", "stosb"),
    ("eb e9", "jmp getline_next"),
    ("", "getline_end:"),
    ("30 c0", "xor al, al"),
    ("aa", "stosb"),
    ("b0 0d", "mov al, 0x0d"),
    ("e8 b7 ff", "call putc"),
    ("b0 0a", "mov al, 0x0a"),
    ("eb b3", "jmp putc"),
    # match: is the line in the buffer the text at si? Answers in the zero flag.
    ("", "match:"),
    ("bf 00 06", "mov di, 0x600"),
    ("", "match_next:"),
    ("ac", "lodsb"),
    ("ae", "scasb"),
    ("75 04", "jne match_end"),
    ("84 c0", "test al, al"),
    ("75 f8", "jnz match_next"),
    ("", "match_end:"),
    ("c3", "ret"),
    # ticks: waits for cx ticks of the BIOS clock (18.2 Hz), asleep.
    ("", "ticks:"),
    ("8b 1e 6c 04", "mov bx, [0x46c]"),
    ("", "ticks_wait:"),
    ("fb", "sti"),
    ("f4", "hlt"),
    ("a1 6c 04", "mov ax, [0x46c]"),
    ("29 d8", "sub ax, bx"),
    ("39 c8", "cmp ax, cx"),
    ("72 f5", "jb ticks_wait"),
    ("c3", "ret"),
    # write: cx sectors from bx to the first hard disk at sector edx. Carry says that it failed.
    ("", "write:"),
    ("c7 06 00 07 10 00", "mov word [0x700], 0x0010"),
    ("89 0e 02 07", "mov [0x702], cx"),
    ("89 1e 04 07", "mov [0x704], bx"),
    ("c7 06 06 07 00 00", "mov word [0x706], 0"),
    ("66 89 16 08 07", "mov [0x708], edx"),
    ("66 c7 06 0c 07 00 00 00 00", "mov dword [0x70c], 0"),
    ("be 00 07", "mov si, 0x700"),
    ("b2 80", "mov dl, 0x80"),
    ("b8 00 43", "mov ax, 0x4300"),
    ("cd 13", "int 0x13"),
    ("c3", "ret"),
    ("", "loaded:"),
)
"""What every program begins with: machine code in hexadecimal, and the assembly (nasm) that it comes from."""


def _labels() -> dict[str, int]:
    """Label -> address."""
    at, found = BASE, {}
    for code, text in LISTING:
        if text.endswith(":"):
            found[text[:-1]] = at
        at += len(bytes.fromhex(code))
    return found


LABELS = _labels()


def sector(*actions: bytes) -> bytes:
    """Make a bootable image, a multiple of 512 bytes, that does `actions` in order and then hangs."""
    body = b"".join(actions) + hang()
    if len(body) > CONTENT_MAX:
        raise ValueError(f"{len(body)} bytes of actions do not fit into {CONTENT_MAX}")
    first = bytearray(b"".join(bytes.fromhex(code) for code, _ in LISTING))
    if len(first) + len(body) <= SECTOR - 2:
        return bytes(first + body).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
    count = -(-len(body) // SECTOR)
    at = LABELS["dap_count"] - BASE
    first[at : at + 2] = _word(count)
    first += b"\xe9" + _word(SECTOR - len(first) - 3)  # jmp 0x7e00
    return bytes(first).ljust(SECTOR - 2, b"\0") + b"\x55\xaa" + body.ljust(count * SECTOR, b"\0")


def cd(*actions: bytes, files: dict[str, bytes] | None = None) -> bytes:
    """Make a CD image (El Torito, no emulation) that does `actions`; `files` are names in its root, as in "PFI.CON"."""
    boot = sector(*actions)
    boot += b"\0" * (-len(boot) % 2048)
    disc, out = pycdlib.PyCdlib(), io.BytesIO()
    disc.new()
    for name, data in {"BOOT.BIN": boot, **(files or {})}.items():
        disc.add_fp(io.BytesIO(data), len(data), f"/{name};1")
    disc.add_eltorito("/BOOT.BIN;1", bootcatfile="/BOOT.CAT;1", boot_load_size=len(boot) // SECTOR)
    disc.write_fp(out)
    disc.close()
    return out.getvalue()


def phase(
    token: str, *, steps: tuple[str, ...] = ("one",), hostkey: str = "", verdict: str | None = "0", power: bool = True
) -> bytes:
    """Act as a phase does: the sentinels of `token`, then power off.

    `verdict` is what follows `exit`, as in "3 false"; None leaves the verdict out, and `power` False the power-off.
    """
    lines = ["begin", *(f"step {title}" for title in steps)]
    lines += [f"hostkey {hostkey}"] if hostkey else []
    lines += [] if verdict is None else [f"exit {verdict}"]
    return b"".join(say(f"::vmtasks:{token}:{line}\r\n") for line in lines) + (power_off() if power else b"")


def ask(prompt: str, accept: str, *, error: str = "unknown command\r\n") -> bytes:
    """Print `prompt`, read a line with echo, and go on only if it is `accept`; else `error` and again.

    An empty line gets the prompt again without the error, so that a line may end with CR, LF or both.
    """
    read = say(prompt) + _call("getline") + b"\x80\x3e\x00\x06\x00"  # cmp byte [0x600], 0
    empty = b"\x0f\x84" + _word(-len(read) - 4)  # je to the start
    wrong = say(error)
    test = _text(accept) + _call("match")
    done = b"\x0f\x84" + _word(len(wrong) + 3)  # je past the error and the jump
    body = read + empty + test + done + wrong
    return body + _back(body)


def debug_exit(code: int) -> bytes:
    """End QEMU with status `code` * 2 + 1, with `-device isa-debug-exit,iobase=0x501,iosize=1`; 0 to 127."""
    return b"\xba\x01\x05" + b"\xb0" + bytes([code]) + b"\xee"  # mov dx, 0x501; mov al, code; out dx, al


def forever(*actions: bytes) -> bytes:
    """Do `actions` again and again."""
    body = b"".join(actions)
    return body + _back(body)


def hang(how: str = "idle") -> bytes:
    """Stop making progress: "idle" sleeps and takes interrupts, "dead" sleeps without, "busy" burns the CPU."""
    return {"busy": b"\xeb\xfe", "dead": b"\xfa\xf4\xeb\xfd", "idle": b"\xfb\xf4\xeb\xfd"}[how]


def power_off() -> bytes:
    """Power off through ACPI; of the two old machine types only `-machine pc` has the port here."""
    return b"\xba\x04\x06\xb8\x00\x20\xef" + hang()  # mov dx, 0x604; mov ax, 0x2000; out dx, ax


def reboot() -> bytes:
    """Reset through the chip set, port 0xCF9."""
    return b"\xba\xf9\x0c\xb0\x06\xee" + hang()  # mov dx, 0xcf9; mov al, 6; out dx, al


def say(text: str) -> bytes:
    """Print `text` on COM1; a line ends with CR LF, as every real console has it."""
    return _text(text) + _call("puts")


def triple_fault() -> bytes:
    """Reset as a kernel without working exception handlers does: no interrupt table, then an interrupt."""
    return b"\xe8\x06\x00" + bytes(6) + b"\x5e\xfa\x0f\x01\x1c\xcc"  # call over 6 zeros; pop si; cli; lidt [si]; int3


def wait_key(key: str) -> bytes:
    """Read from COM1, without echo, until `key` has come."""
    body = _call("getc") + b"\x3c" + key.encode("ascii")  # cmp al, key
    return body + b"\x75" + bytes([256 - len(body) - 2])  # jne to the start


def wait_ticks(count: int) -> bytes:
    """Sleep for `count` ticks of the BIOS clock, 18.2 in a second, at most 65535."""
    return b"\xb9" + _word(count) + _call("ticks")  # mov cx, count


def write_disk(data: bytes, *, lba: int = 0) -> bytes:
    """Write `data`, padded to whole sectors, to the first hard disk from sector `lba`: a fake installer."""
    padded = data + b"\0" * (-len(data) % SECTOR)
    registers = b"\x5b\xb9" + _word(len(padded) // SECTOR) + b"\x66\xba" + lba.to_bytes(4, "little")
    failed = say("cannot write the disk\r\n") + hang("dead")
    return (
        b"\xe8"  # call over the data; pop bx; mov cx, sectors; mov edx, lba
        + _word(len(padded))
        + padded
        + registers
        + _call("write")
        + (b"\x0f\x83" + _word(len(failed)))  # jnc past the complaint
        + failed
    )


def _back(body: bytes) -> bytes:
    """`jmp` to the start of `body`, which it follows."""
    return b"\xe9" + _word(-len(body) - 3)


def _call(label: str) -> bytes:
    """`mov ax, address; call ax`: unlike a plain call the same wherever it is put. Leaves the flags to the callee."""
    return b"\xb8" + _word(LABELS[label]) + b"\xff\xd0"


def _text(text: str) -> bytes:
    """`call` over a text with a zero byte after it, then `pop si`: si is the text's address."""
    raw = text.encode()
    if b"\0" in raw:
        raise ValueError("a text ends at its first zero byte")
    return b"\xe8" + _word(len(raw) + 1) + raw + b"\0\x5e"


def _word(value: int) -> bytes:
    """16 bits, little endian; negative values wrap, as displacements do."""
    return (value & 0xFFFF).to_bytes(2, "little")
