"""Why one URL did not give the file, and whether asking again can help."""

NETWORK_HINT = (
    "check the network and HTTP_PROXY, HTTPS_PROXY, NO_PROXY; then run it again, what has arrived is kept;"
    " a file:// URL or a path to a file that you have is accepted too"
)


class Problem(Exception):  # noqa: N818 - not an error until all mirrors have been tried
    """This URL did not give the file: `again` if it still may, `poison` if what has arrived must not be kept."""

    def __init__(
        self, reason: str, hint: str = NETWORK_HINT, *, again: bool = False, poison: bool = False, wait_s: float = 0
    ) -> None:
        """`reason` ends the sentence `URL ...`; `wait_s` is how long the server asks to be left alone."""
        super().__init__(reason)
        self.hint = hint
        self.again = again
        self.poison = poison
        self.wait_s = wait_s


def bad(reason: str) -> Problem:
    """What came is not the file that was promised."""
    hint = "the file there is damaged or was replaced, or the digest in the configuration is another file's: compare it"
    return Problem(reason, f"{hint} with what the project publishes, or use another mirror", poison=True)


def html_page() -> Problem:
    """A page for people came instead of a file."""
    hint = "look at the URL in a browser: a login page of the network, a mirror that moved, or a missing file"
    return Problem("sent an HTML page, not the file", hint, poison=True)
