"""The only user of paramiko's private names. Each has a test in test_client.py."""

import logging
import socket
from typing import Any, ClassVar

import paramiko
from paramiko.common import MSG_CHANNEL_REQUEST
from paramiko.transport import ChannelMap

LOG = "vmtasks.paramiko"
WINDOW_BYTES = 4 << 20
TERM = "xterm-256color"
logging.getLogger(LOG).setLevel(logging.CRITICAL + 1)  # it logs with tracebacks the errors that are raised here


def _handle_request_message(channel: Any, message: Any) -> None:
    """Record the signal that ended a command, which paramiko ignores: RFC 4254, 6.10."""
    if message.get_text() == "exit-signal":
        message.get_boolean()
        channel.exit_signal = message.get_text()
        return
    message.rewind()
    message.get_int()  # the channel's number
    paramiko.Channel._handle_request(channel, message)  # noqa: SLF001


def _request(channel: Any, kind: str, *values: str | bytes | int, want_reply: bool) -> paramiko.Message:
    message = paramiko.Message()
    message.add_byte(bytes([MSG_CHANNEL_REQUEST]))
    message.add_int(channel.remote_chanid)
    message.add_string(kind)
    message.add_boolean(want_reply)
    for value in values:
        (message.add_int if isinstance(value, int) else message.add_string)(value)
    return message


class _Channels(ChannelMap):  # type: ignore[misc]  # paramiko has no types
    """paramiko's map, without channels that open_channel() has not finished: close() fails on them."""

    def values(self) -> list[Any]:
        return [channel for channel in super().values() if channel.transport is not None]


class Transport(paramiko.Transport):  # type: ignore[misc]  # as above
    """One SSH connection. A channel whose command was ended by a signal has its name as `exit_signal`."""

    _channel_handler_table: ClassVar[dict[int, Any]] = {
        **paramiko.Transport._channel_handler_table,  # noqa: SLF001
        MSG_CHANNEL_REQUEST: _handle_request_message,
    }

    def __init__(self, sock: socket.socket) -> None:
        """Wrap a connected socket; nothing is sent yet."""
        super().__init__(sock, default_window_size=WINDOW_BYTES)
        self._channels = _Channels()
        self.set_log_channel(LOG)

    def send_exec(self, channel: Any, line: str) -> None:
        """Send a command line on an open channel without waiting: a server that refuses it closes the channel.

        Channel.exec_command() waits for the reply, which costs a round trip and has no deadline.
        """
        self._send_user_message(_request(channel, "exec", line, want_reply=True))

    def send_pty(self, channel: Any, size: tuple[int, int]) -> None:
        """Ask for a terminal of so many columns and rows, without waiting; RFC 4254, 6.2. Then call send_exec().

        Servers refuse a terminal in their log only, and run the command without.
        """
        self._send_user_message(_request(channel, "pty-req", TERM, *size, 0, 0, b"", want_reply=False))
