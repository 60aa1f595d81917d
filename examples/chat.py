"""A chat in the terminal.

    python examples/chat.py MODEL [flags]

An empty line is passed over; /clear begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence

import talk  # first: it puts qlora.py on the path

import qlora

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  # arrow keys and earlier lines in input()


def lines() -> Iterator[str]:
    """What is typed, or piped in, until its end or /quit."""
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while (line := input(prompt).strip()) != "/quit":
            yield line


def main(argv: Sequence[str] | None = None) -> None:
    options, flags = talk.Parser(__doc__, template="auto").words(argv)
    bot = talk.load_from(options, flags)
    print("/clear begins anew, /quit ends, Ctrl-C stops an answer", file=sys.stderr)
    history: list[talk.Message] = []
    for line in lines():
        if line == "/clear":
            history = []
        elif line:
            history.append({"role": "user", "content": line})
            history.append({"role": "assistant", "content": say(bot, history)})


def say(bot: talk.Bot, history: Sequence[talk.Message]) -> str:
    """Print the answer as it comes; what was printed of it belongs to the conversation, also if it was stopped."""
    text = ""
    try:
        for piece in bot.answer(history):
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except qlora.QLoRAError as error:
        print(f"error: {error}", end="", file=sys.stderr)
    print()
    return text.strip()


if __name__ == "__main__":
    sys.exit(talk.run(main))
