"""What all tests share: signals as an interactive shell gives them."""

import signal


def pytest_configure() -> None:
    """A shell starts a command in the background with SIGINT and SIGQUIT ignored, and so would all that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
