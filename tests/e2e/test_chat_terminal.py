"""`lexmill chat` on a real terminal: typed lines, several lines, the arrow keys, Ctrl-C and Ctrl-D."""

import json
import os
import select
import subprocess
import sys
import time

import pytest

pty = pytest.importorskip("pty")


class Terminal:
    """The command on a pseudo-terminal; `until` reads what it shows."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lexmill.cli.main", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"},
        )
        os.close(slave)
        self.seen = ""

    def type(self, keys):
        os.write(self.master, keys.encode())

    def until(self, said, times=1, limit=30):
        """Read on until `said` was shown `times` times since the last call; returns what was shown."""
        end = time.monotonic() + limit
        while self.seen.count(said) < times:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # the other end is gone
                    break
        shown, self.seen = self.seen, ""
        assert said in shown, shown
        return shown

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal to it


PROMPT = "\x1b[?2004h"  # sent once, as a line begins to be read; the words "you >" come in pieces


@pytest.mark.slow
def test_a_talk_on_a_terminal(model_path, tmp_path):
    saved = tmp_path / "talk.jsonl"
    terminal = Terminal("chat", model_path, "-n", 5)
    try:
        assert "/help lists the commands" in terminal.until(PROMPT)
        terminal.type("Hello\x1b\rworld\r")  # Alt+Enter between the two lines
        terminal.until(PROMPT)
        terminal.type("half a li\x03")  # Ctrl-C clears it
        terminal.until(PROMPT)
        terminal.type("\x03")
        assert "/exit leaves" in terminal.until(PROMPT)
        terminal.type(f"/save {saved}\r")
        assert "written to" in terminal.until(PROMPT)
        first = json.loads(saved.read_text("utf-8"))["messages"]
        terminal.type("/reset\r")
        assert "is forgotten" in terminal.until(PROMPT)
        terminal.type("\x1b[A\x1b[A\r")  # arrow up twice: the /save line again
        assert "written to" in terminal.until(PROMPT)
        terminal.type("\x04")  # Ctrl-D; before the prompt it would be the terminal's, and lost
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()
    assert first[0] == {"role": "user", "content": "Hello\nworld"}
    assert [message["role"] for message in first] == ["user", "assistant"]
    assert json.loads(saved.read_text("utf-8")) == {"messages": []}


def talk(monkeypatch, *words):
    """A conversation with a model that says these words and is then interrupted."""
    from lexmill.cli.chat import Conversation
    from lexmill.inference.generation import GenerationConfig, Step

    class Model:
        def stream_chat(self, messages, config):
            yield from (Step(0, word) for word in words)
            raise KeyboardInterrupt

        config = type("Config", (), {"context": 100})

    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    return Conversation(Model(), GenerationConfig(), "")


def test_ctrl_c_stops_a_reply_and_not_the_talk(monkeypatch, capsys):
    conversation = talk(monkeypatch, "Well", " then")
    assert conversation.take("Hello")
    assert capsys.readouterr().out == "Well then (stopped)\n"
    assert [message["content"] for message in conversation.messages] == ["Hello", "Well then"]


def test_a_question_stopped_before_the_first_word_was_not_asked(monkeypatch, capsys):
    conversation = talk(monkeypatch)
    assert conversation.take("Hello") and conversation.messages == []
    assert capsys.readouterr().out == " (stopped)\n"
