"""Answer one prompt, printed as it is generated.

    python examples/generate.py MODEL "prompt" [flags]
    echo "prompt" | python examples/generate.py MODEL [flags]

The prompt is given to the model as it stands, as the `input` of a training row is; --template chat or guanaco makes it
the first message of a conversation.
"""

import sys
from collections.abc import Sequence

import talk  # first: it puts qlora.py on the path

import qlora


def main(argv: Sequence[str] | None = None) -> None:
    parser = talk.Parser(__doc__, template="plain")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="default: what comes on standard input")
    options, flags = parser.words(argv)
    if options.prompt is None and not sys.stdin.isatty():
        options.prompt = sys.stdin.read().removesuffix("\n")
    if not options.prompt:
        raise qlora.ConfigError("no prompt: give one after the model, or on standard input")
    bot = talk.load_from(options, flags)
    for piece in bot.answer([{"role": "user", "content": options.prompt}]):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(talk.run(main))
