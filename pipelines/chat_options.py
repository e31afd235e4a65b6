"""What `apply_chat_template` takes besides a template's variables: names that `chat_template_kwargs` would reach it by.

Source: transformers 5 `tokenization_utils_base.py`, and `render_jinja_template` behind it, to which variables go on.
"""

from __future__ import annotations

#: All of them. A client who sent one would choose what runs here: `chat_template` is a program of its own.
CHAT_OPTIONS = frozenset(
    {
        "self",
        "conversation",
        "conversations",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
#: Those that would leave a job without prompts. The others are its author's, or say nothing where texts are made.
NO_PROMPTS = frozenset(
    {
        "self",
        "conversation",
        "conversations",
        "messages",
        "continue_final_message",
        "tokenize",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    }
)
