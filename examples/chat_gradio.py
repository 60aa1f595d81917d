"""A chat in the browser, reachable only from this machine (127.0.0.1).

pip install -r examples/requirements.txt
python examples/chat_gradio.py MODEL [flags]
"""

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import talk  # must be first: it puts qlora.py on the path

import qlora

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # send nothing off this machine
try:
    import gradio
except ImportError:
    gradio = None  # type: ignore[assignment]


EMPTY = "(no answer: the model ended it at once)"  # without any text Gradio shows no message and seems to hang


def get_text(content: Any) -> str:
    """The text of a message, which Gradio stores in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def reply(
    bot: talk.Bot, message: str, history: list[dict[str, Any]], system: str, temperature: float, length: int
) -> Iterator[str]:
    """The answer so far, each time a new piece arrives."""
    messages = [{"role": turn["role"], "content": get_text(turn["content"])} for turn in history]
    messages = [{**turn, "content": turn["content"].replace(EMPTY, "")} for turn in messages]
    bot.system, text = system, ""
    bot.generation.update(do_sample=temperature > 0, temperature=float(temperature) or 1.0, max_new_tokens=int(length))
    try:
        for piece in bot.answer([*messages, {"role": "user", "content": message}]):
            text += piece
            yield text
    except qlora.ConfigError as error:
        raise gradio.Error(str(error)) from error
    if not text:
        yield EMPTY


def settings(bot: talk.Bot) -> list[Any]:
    """The controls below the chat, which begin as the command line says."""
    generation = bot.generation
    temperature = generation.temperature or 1.0 if generation.do_sample else 0
    length = generation.max_new_tokens or bot.config.generation.max_new_tokens
    return [
        gradio.Textbox(bot.system, label="System prompt"),
        gradio.Slider(0, 2, temperature, label="Temperature (0: always the likeliest token)"),
        gradio.Slider(1, max(2048, length), length, step=1, label="Longest answer, in tokens"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = talk.make_parser(__doc__, template="auto")
    parser.add_argument("--port", type=int, help="default: the first free port from 7860 up")
    options, flags = parser.parse_known_args(argv)
    if gradio is None:
        raise qlora.ConfigError("gradio is not installed: pip install -r examples/requirements.txt")
    bot = talk.load_from(options, flags)
    buttons: Any = ["copy", "copy_all"]  # without the button that shares a chat on the hub
    chatbot = gradio.Chatbot(scale=1, buttons=buttons, show_label=False)
    chat = partial(reply, bot)
    page = gradio.ChatInterface(chat, chatbot=chatbot, title=options.model, additional_inputs=settings(bot))
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # downloads no fonts
    with qlora.reraise_as_user_error(f"--port {options.port}"):
        page.launch(server_name="127.0.0.1", server_port=options.port, share=False, theme=theme)


if __name__ == "__main__":
    sys.exit(talk.run(main))
