"""A chat in the terminal.

    python examples/chat.py MODEL [flags]

/clear starts a new conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer. Empty lines are ignored.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence

import talk  # must be first: it puts qlora.py on the path

import qlora

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  # arrow keys and earlier lines in input()


def lines() -> Iterator[str]:
    """Lines of standard input, until it ends or one is /quit."""
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while (line := input(prompt).strip()) != "/quit":
            yield line


def main(argv: Sequence[str] | None = None) -> None:
    options, flags = talk.make_parser(__doc__, template="auto").parse_known_args(argv)
    bot = talk.load_from(options, flags)
    print("/clear starts a new conversation, /quit leaves, Ctrl-C stops an answer", file=sys.stderr)
    history: list[talk.Message] = []
    for line in lines():
        if line == "/clear":
            history = []
        elif line:
            history.append({"role": "user", "content": line})
            history.append({"role": "assistant", "content": print_answer(bot, history)})


def print_answer(bot: talk.Bot, history: Sequence[talk.Message]) -> str:
    """Print the answer as it is generated. Returns what was printed, also if Ctrl-C cut it short."""
    text = ""
    try:
        for piece in bot.answer(history):
            print(piece, end="", flush=True)
            text += piece
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    except qlora.ConfigError as error:
        print(f"error: {error}", end="", file=sys.stderr)
    print()
    return text.strip()


if __name__ == "__main__":
    sys.exit(talk.run(main))
