"""What is written on a command line: each form that is taken, and for each that is not, which side is wrong."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmtasks.config import arguments
from vmtasks.config.arguments import Bind, Forward
from vmtasks.config.load import parse_size
from vmtasks.errors import ConfigError

MIB = 1 << 20
ED25519 = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(32)).decode()
SECRET = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ"  # noqa: S105 - nobody's


@pytest.mark.parametrize(
    ("text", "mib"),
    [("2048", 2048), ("1.5G", 1536), ("512m", 512), ("512M", 512), ("2g", 2048), ("1048576K", 1024), ("1.9999M", 1),
     (" 64 ", 64), ("0.5g", 512), ("1500.7K", 1)],
)  # fmt: skip
def test_memory(text: str, mib: int) -> None:
    assert arguments.memory(text) == mib * MIB


@pytest.mark.parametrize("text", ["", "4GB", "2T", "G", "-1", "1,5G", "0", "0.1K", "1e3", "٣G", "1.G", ".5G", "1 G"])
def test_no_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        arguments.memory(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("20G", 20 << 30), ("20GB", 20 << 30), ("1T", 1 << 40), ("1tb", 1 << 40), ("512MB", 512 * MIB), ("8k", 8192),
     ("4KB", 4096), ("10B", 10), ("1024", 1024)],
)  # fmt: skip
def test_size(text: str, size: int) -> None:
    assert parse_size(text, "--disk") == size


@pytest.mark.parametrize("text", ["", "1.5G", "G", "0", "-1G", "5GiB", "5BB", "5 G"])
def test_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--disk"):
        parse_size(text, "--disk")


@pytest.mark.parametrize(
    ("text", "sides"), [("8080:80", (8080, 80)), ("0:22", (0, 22)), ("65535:65535", (65535, 65535))]
)
def test_forward(text: str, sides: tuple[int, int]) -> None:
    made = Forward.parse(text)
    assert (made.host, made.guest) == sides
    assert str(made) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8080", "no colon"),
        ("", "no colon"),
        (":80", "the host's side is missing"),
        ("80:", "the guest's side is missing"),
        ("x:80", "the host's side, 'x', is not a port"),
        ("80:x", "the guest's side, 'x', is not a port"),
        ("70000:80", "the host's side, 70000, is out of range"),
        ("80:70000", "the guest's side, 70000, is out of range"),
        ("80:0", "the guest's side is 0"),
        ("1:2:3", "the guest's side, '2:3', is not a port"),
        ("-1:80", "the host's side, '-1', is not a port"),
        ("٨٠:80", "the host's side"),
    ],
)
def test_no_forward(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Forward.parse(text)
    assert says in error.value.message


def test_one_port_of_this_host_leads_to_one_place() -> None:
    arguments.distinct(0, [Forward(0, 80), Forward(0, 80), Forward(8080, 80), Forward(8081, 80)])
    with pytest.raises(ConfigError, match="-p 1:2 and -p 1:3: port 1 of this host is given twice"):
        arguments.distinct(2222, [Forward(1, 2), Forward(1, 3)])
    with pytest.raises(ConfigError, match="--ssh-port 2222 and -p 2222:80"):
        arguments.distinct(2222, [Forward(1, 2), Forward(2222, 80)])


@given(st.text(max_size=12))
def test_a_forward_is_taken_or_refused(text: str) -> None:
    try:
        made = str(Forward.parse(text))
    except ConfigError:
        return
    assert made == ":".join(str(int(side)) for side in text.split(":"))


@pytest.mark.parametrize(
    ("text", "bind"),
    [
        ("/a:/b", Bind("/a", "/b")),
        ("/a:/b:ro", Bind("/a", "/b", read_only=True)),
        ("/a:/b:rw", Bind("/a", "/b")),
        (".:/work/x/", Bind(".", "/work/x")),
        (".://work//./x", Bind(".", "/work/x")),
        ("/with:colon:/b", Bind("/with:colon", "/b")),
        ("/with:colon:/b:ro", Bind("/with:colon", "/b", read_only=True)),
        ("/ü ö:/x y", Bind("/ü ö", "/x y")),
    ],
)
def test_bind(text: str, bind: Bind) -> None:
    assert Bind.parse(text) == bind


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/a", "no colon"),
        (":/b", "the host's side is missing"),
        ("/a:", "the guest's side is missing"),
        ("/a:b", "the guest's side, 'b', must be an absolute path"),
        ("/a:/", "the guest's side, '/', must be an absolute path below /"),
        ("/a:/../etc", "the guest's side"),
        ("/a:/b/../c", "the guest's side"),
        ("/a://", "the guest's side"),
        ("/a:/x\ny", "the guest's side"),
        ("/a:ro", "the guest's side, 'ro'"),
    ],
)
def test_no_bind(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Bind.parse(text)
    assert says in error.value.message


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ((".:/work", "/b:/work:ro"), "both are at /work"),
        ((".:/work", "/b:/work/"), "both are at /work"),
        ((".:/work", "/b://work"), "both are at /work"),
        (("/b:/work/a/x", "/c:/y", ".:/work/./a"), "one is inside the other"),
        ((".:/work", "/b:/work//x"), "one is inside the other"),
    ],
)
def test_binds_that_would_mix(texts: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        arguments.apart([Bind.parse(text) for text in texts])
    for text in (texts[0], texts[-1]):
        assert f"'{Bind.parse(text)}'" in error.value.message


def test_binds_that_are_made_without_a_command_line_mix_too() -> None:
    with pytest.raises(ConfigError, match="both are at /b"):
        arguments.apart([Bind(".", "/a/../b/"), Bind("x", "//b")])


@pytest.mark.parametrize("texts", [(), (".:/a",), (".:/a", ".:/ab", ".:/b/a", "/c:/c d/a:ro")])
def test_binds_that_are_apart(texts: tuple[str, ...]) -> None:
    binds = [Bind.parse(text) for text in texts]
    arguments.apart(binds)
    assert [Bind.parse(str(bind)) for bind in binds] == binds


@pytest.mark.parametrize(("text", "parts"), [("", ("", "")), ("tiny", ("tiny", "")), ("tiny:s-1", ("tiny", "s-1"))])
def test_image(text: str, parts: tuple[str, str]) -> None:
    assert arguments.image(text) == parts


@pytest.mark.parametrize("text", ["tiny:", ":", ":one", "../x", "tiny:../../x", "a b", "tiny:a:b", "-x"])
def test_no_image(text: str) -> None:
    with pytest.raises(ConfigError, match="image"):
        arguments.image(text)


@pytest.mark.parametrize("text", ["", "..", ".hidden", "a/b", "-x", "a b", "x" * 64, "ü"])
def test_no_machine_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        arguments.machine_name(text)


@pytest.mark.parametrize("text", ["", "Root", "a b", "-l", "x;y", "9lives"])
def test_no_user(text: str) -> None:
    with pytest.raises(ConfigError, match="--user"):
        arguments.user(text)


def test_public_keys_of_a_file() -> None:
    text = f"# mine\n\nssh-ed25519 {ED25519} me at home\nssh-ed25519 {ED25519}\n"
    first, second = arguments.public_keys(text, "keys")
    assert str(first) == f"ssh-ed25519 {ED25519} me at home"
    assert str(second) == f"ssh-ed25519 {ED25519}"
    assert first.fingerprint.startswith("SHA256:")
    assert len(first.fingerprint) == 50


def test_half_a_public_key_is_none() -> None:
    assert arguments.public_key(f"ssh-ed25519 {ED25519}") is not None
    for end in range(4, len(ED25519), 4):
        assert arguments.public_key(f"ssh-ed25519 {ED25519[:end]}") is None, end


@pytest.mark.parametrize(
    "text",
    [
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{SECRET}\n-----END OPENSSH PRIVATE KEY-----\n",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n",
        f"PuTTY-User-Key-File-3: ssh-ed25519\n{SECRET}\n",
        f"{SECRET}\n",
        f"ssh-ed25519 {SECRET}\n",
        f'command="id" ssh-ed25519 {ED25519}\n',
        f"ssh-dss {ED25519} {SECRET}",
        f"ssh-rsa {ED25519} {SECRET}",
        f"ssh-ed25519 {ED25519} {SECRET}\x1b[2J",
        "",
        "# nothing\n",
    ],
)  # fmt: skip
def test_what_is_no_public_key_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        arguments.public_keys(text, "keys")
    assert SECRET[:12] not in str(error.value)
    assert ED25519[:40] not in str(error.value)
