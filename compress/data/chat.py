"""Conversations as text: through the tokenizer's own chat template, as the model was trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.data.readers import Chat
from compress.errors import CompressError
from compress.models.special_tokens import added_tokens


def render_chats(
    documents: Sequence[str | Chat], about: str, tokenizer: Any
) -> tuple[list[str], str]:
    """Make text of the conversations among ``documents``; strings stay as they are.

    What the tokenizer would put in front of any text (BOS) is cut off where the template writes it
    too: it comes back with the other special tokens, once.

    Returns:
        The texts, and the line about them.

    Raises:
        CompressError: there are conversations, and no tokenizer or one without a chat template, or
            messages that the template refuses.
    """
    if all(isinstance(document, str) for document in documents):
        return list(documents), about
    if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
        raise CompressError(
            f"a tokenizer with a chat template, for the conversations in {about}",
            "none" if tokenizer is None else "a tokenizer without one",
            "Set field to a column of texts, or use the tokenizer of a chat model",
        )
    start = tokenizer.decode(list(added_tokens(tokenizer)[0]))
    texts = [d if isinstance(d, str) else _render(d, about, tokenizer, start) for d in documents]
    return texts, f"{about}, conversations through the chat template"


def _render(messages: Chat, about: str, tokenizer: Any, start: str) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever a template written by somebody raises
        raise CompressError(
            f"conversations in {about} that the chat template takes",
            f"{type(error).__name__}: {error}",
            "Mend the messages (roles and their order), or set field to a column of texts",
        ) from error
    return text.removeprefix(start) if start else text
