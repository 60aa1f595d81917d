"""Answer one prompt, printed as it is generated.

    python examples/generate.py MODEL "prompt" [flags]
    echo "prompt" | python examples/generate.py MODEL [flags]

The model reads the prompt as it is, like the `input` of a training row. --template chat or guanaco makes it the first
message of a conversation.
"""

import sys
from collections.abc import Sequence

import talk  # must be first: it puts qlora.py on the path

import qlora


def main(argv: Sequence[str] | None = None) -> None:
    parser = talk.make_parser(__doc__, template="plain")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="default: standard input")
    options, flags = parser.parse_known_args(argv)
    if options.prompt is None and not sys.stdin.isatty():
        options.prompt = sys.stdin.read().removesuffix("\n")
    if not options.prompt:
        raise qlora.ConfigError("no prompt: pass one after MODEL or on standard input")
    bot = talk.load_from(options, flags)
    for piece in bot.answer([{"role": "user", "content": options.prompt}]):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(talk.run(main))
