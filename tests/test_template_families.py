"""Chat templates of current models: ids and labels against apply_chat_template, and TRL's marked variants of them.

The templates are files of an installed trl, which is not imported. Nothing is downloaded.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import tiny
from conftest import missing

import qlora

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0], "chat_templates") if SPEC else Path("none")
NO = -100


def read_template(name):
    if not FOLDER.is_dir():
        missing("trl is not installed: pip install -r tests/requirements.txt")
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_for(template):
    """One token a byte, and one for each marker in the template."""
    markers = sorted(set(re.findall(r"<[|｜]?[\w▁/:]+[|｜]?>|<\|?/?\w+\|?>|\[/?[A-Z_]+\]|<\|\"\|>", template)))
    tokenizer = tiny.byte_tokenizer(extra=[marker for marker in markers if marker not in ("<s>", "</s>", "<pad>")])
    tokenizer.chat_template = template
    return tokenizer


def message(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PARAMETERS}}
CHATS = {
    "plain": [
        message("user", "Hi"),
        message("assistant", "Hello."),
        message("user", "And?"),
        message("assistant", "ok"),
    ],
    "reasoning": [
        message("user", "2+2?"),
        message("assistant", "4.", reasoning_content="Two and two.", thinking="Two and two."),
        message("user", "3+3?"),
        message("assistant", "6.", reasoning_content="Three.", thinking="Three."),
    ],
    "one": [message("user", "Wer?"), message("assistant", "Ich, <b>\n")],
}
