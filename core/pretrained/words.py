"""Token ids of a tokenizer as text."""

from typing import Any

from numpy.typing import NDArray


class Words:
    """Token ids as text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        """One token: its text, or its name if it is a part of a character."""
        if token not in self._known:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            if not text or "\ufffd" in text:
                text = str(self.tokenizer.convert_ids_to_tokens([token])[0])
            self._known[token] = text
        return self._known[token]

    def text(self, id_T: NDArray[Any]) -> str:
        """Several tokens as they read together."""
        return str(self.tokenizer.decode(id_T.tolist(), clean_up_tokenization_spaces=False)).replace("\ufffd", "?")
